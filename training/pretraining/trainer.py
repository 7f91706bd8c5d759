"""The trainer of the autoregressive point model: slot metrics, and speed in the logs."""

import time

from training.common.exact_trainer import ExactTrainer
from training.pretraining.metrics import decoder_parameters, flops_per_token, peak_flops, slot_metrics, slot_sums


class PointillistTrainer(ExactTrainer):
    """Trains `PointillistForCausalLM` on `TrainWindows`, evaluates it on `EvaluationWindows`.

    Logs beside Trainer's own: tokens_per_second (all processes) and mfu since the last log; eval_nll, eval_perplexity and
    eval_accuracy, overall and for the slots x, y, z, face.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_since_log, self.last_log = 0, time.perf_counter()
        self.num_decoder_parameters = decoder_parameters(self.accelerator.unwrap_model(self.model))
        self.context = min(self.train_dataset.window, float(self.train_dataset.rows.lengths.mean()))
        self.peak = peak_flops(self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens_since_log += int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            now = time.perf_counter()
            speed = self.tokens_since_log * self.args.world_size / (now - self.last_log)
            config = self.accelerator.unwrap_model(self.model).config
            condition_tokens = self.num_condition_tokens(config)
            flops = flops_per_token(config, self.num_decoder_parameters, self.context, condition_tokens)
            logs["tokens_per_second"] = round(speed, 1)
            logs["mfu"] = round(speed * flops / (self.peak * self.args.world_size), 4)
            self.tokens_since_log, self.last_log = 0, now
        super().log(logs, *args, **kwargs)

    def num_condition_tokens(self, config) -> int:
        """How many tokens the decoder's cross-attention reads."""
        tokens = config.point_latents if config.use_point_encoder else 0
        if config.use_vision_encoder:
            tokens += (self.train_dataset.rows.tokenizer.image_size // config.vision_config.patch_size) ** 2 + 1
        return tokens

    def batch_sums(self, model, batch):
        labels = batch.pop("labels")
        with self.compute_loss_context_manager():
            logits = model(**batch).logits
        return slot_sums(logits, labels, self.accelerator.unwrap_model(model).config)

    def mean_metrics(self, total):
        metrics = slot_metrics(total)
        return metrics | {"loss": metrics["nll"]}

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self.last_log = time.perf_counter()  # its time is not training time
        return metrics

    def save_model(self, output_dir=None, _internal_call=False):
        """Weights, configuration and tokenizer.

        Not as Trainer's `processing_class`: Trainer takes that for a text processor and looks for a tokenizer inside it.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.train_dataset.rows.tokenizer.save_pretrained(output_dir or self.args.output_dir)
