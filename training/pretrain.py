"""Pre-train the autoregressive point model on a corpus of tokenized avatars.

    accelerate launch training/pretrain.py training/configs/debug.yaml --corpus CORPUS                 # seconds on a CPU
    accelerate launch training/pretrain.py training/configs/small.yaml --corpus CORPUS --bf16 true     # one GPU
    accelerate launch --config_file accelerate_config.yaml training/pretrain.py training/configs/paper.yaml --corpus CORPUS
    ... --resume_from_checkpoint true                                                                  # go on exactly

Every field of the YAML file can be given again on the command line. The output folder holds a model that
`AutoModelForCausalLM.from_pretrained` opens, its tokenizer, a model card and `training_report.json`.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import Dinov2Model, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from modeling import PointillistForCausalLM
from modeling.checks import check_vocabulary
from training.common.arguments import PretrainArguments, exit_on_user_error, flag_named, parse_arguments
from training.common.exact_trainer import checkpoint_to_resume, going_on_from
from training.common.model_card import model_card
from training.common.process import warn_of_missing_processes
from training.common.rows import AvatarRows
from training.pretraining.arguments import DataArguments, ModelArguments
from training.pretraining.metrics import baselines, decoder_parameters
from training.pretraining.trainer import PointillistTrainer
from training.pretraining.windows import EvaluationWindows, TrainWindows, collate_windows


def main() -> None:
    model_arguments, data, arguments = parse_arguments(
        sys.argv[1:], ModelArguments, DataArguments, PretrainArguments, description=__doc__.split("\n\n")[0]
    )
    if arguments.max_steps < 1:
        raise ValueError(
            f"--max_steps must say how long to train, found {arguments.max_steps} (epochs are not counted)"
        )
    warn_of_missing_processes(arguments.world_size)
    checkpoint = checkpoint_to_resume(arguments.resume_from_checkpoint, arguments.output_dir)
    set_seed(arguments.seed)
    corpus = load_corpus(data.corpus)
    model = build_model(model_arguments, corpus)
    config = model.config

    rows = {
        split: AvatarRows(corpus, split, config.use_vision_encoder, config.use_point_encoder)
        for split in ("train", data.eval_split)
    }
    windows_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    train = TrainWindows(
        rows["train"],
        config.sliding_window,
        arguments.max_steps * windows_a_step,
        arguments.seed,
        data.condition_dropout,
    )
    heldout = EvaluationWindows(rows[data.eval_split], config.sliding_window)
    if data.max_eval_avatars is not None:
        heldout.items = [item for item in heldout.items if item[0] < data.max_eval_avatars]

    trainer = PointillistTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=partial(collate_windows, pad_token_id=config.pad_token_id),
    )
    if trainer.is_world_process_zero():
        print(
            f"{decoder_parameters(model) / 1e6:.1f} M parameters in the decoder, "
            f"{get_model_param_count(model) / 1e6:.1f} M in all; "
            f"{len(rows['train'])} avatars, {int(rows['train'].lengths.sum()):,} tokens; "
            + (
                going_on_from(checkpoint, arguments.max_steps)
                if checkpoint
                else f"{arguments.max_steps} steps of {windows_a_step} windows"
            ),
            flush=True,
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    last = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    metrics = last[-1] if last and last[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    save(trainer, model, corpus, rows, data, metrics)


def build_model(arguments: ModelArguments, corpus: Corpus) -> PointillistForCausalLM:
    """A new model for the corpus' vocabulary, or the checkpoint that `--model` names."""
    tokenizer = corpus.tokenizer
    if arguments.model is None:
        config = arguments.config(tokenizer)
        config._attn_implementation = arguments.attn_implementation
        model = PointillistForCausalLM(config)
        if arguments.use_vision_encoder and arguments.vision_model:
            with flag_named("--vision_model", arguments.vision_model):
                vision = Dinov2Model.from_pretrained(arguments.vision_model, dtype=torch.float32)
            # The module itself, not a copy of its weights: under ZeRO-3 each process holds only a piece of them.
            model.condition_encoder.use_vision(vision)
        return model
    with flag_named("--model", arguments.model):
        model = PointillistForCausalLM.from_pretrained(
            arguments.model, attn_implementation=arguments.attn_implementation, dtype=torch.float32
        )
    check_vocabulary(model.config, tokenizer, f"--model {arguments.model}", f"the corpus {corpus.path}")
    return model


def save(trainer: PointillistTrainer, model, corpus: Corpus, rows: dict, data: DataArguments, metrics: dict) -> None:
    """Model, tokenizer, card and report into the output folder."""

    def write_more(folder: Path) -> None:
        report = training_report(trainer, model, rows, data, metrics)
        (folder / "README.md").write_text(model_card(model.config, corpus, report, trainer.args))
        (folder / "training_report.json").write_text(json.dumps(report, indent=2))
        (folder / "training_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        print(
            f"held-out NLL {report['heldout_nll']:.3f} nats a token (unigram {report['unigram_nll']:.3f}, "
            f"uniform {report['uniform_nll']:.3f}); model in {trainer.args.output_dir}"
        )

    trainer.save_finished(write_more)


def training_report(trainer: PointillistTrainer, model, rows: dict, data: DataArguments, metrics: dict) -> dict:
    """What `training_report.json` holds."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "num_subjects": sum(len(r) for r in rows.values()),
        "num_tokens": int(sum(r.lengths.sum() for r in rows.values())),
        "num_parameters": decoder_parameters(model),
        "steps": trainer.state.global_step,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "heldout_nll": metrics["eval_nll"],
        **baselines(rows["train"], rows[data.eval_split]),
        **{name.replace("eval_", "heldout_"): value for name, value in metrics.items() if name.startswith("eval_")},
    }


if __name__ == "__main__":
    exit_on_user_error(main)
