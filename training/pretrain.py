"""Pre-train the autoregressive point model on a corpus of tokenized avatars.

    accelerate launch training/pretrain.py training/configs/debug.yaml --corpus CORPUS                 # seconds on a CPU
    accelerate launch training/pretrain.py training/configs/small.yaml --corpus CORPUS --bf16 true     # one GPU
    accelerate launch --config_file accelerate_config.yaml training/pretrain.py training/configs/paper.yaml --corpus CORPUS
    ... --resume_from_checkpoint true                                                                  # resume exactly

The output folder holds a model that `AutoModelForCausalLM.from_pretrained` opens, its tokenizer, a model card and
`training_report.json`. Every field of the YAML file can also be given on the command line.
"""

import sys
from functools import partial

import torch
from transformers import Dinov2Model, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.heads.loading import load_head
from modeling import PointillistForCausalLM
from training.common.arguments import exit_on_user_error, flag_named, parse_arguments
from training.common.exact_trainer import checkpoint_to_resume
from training.common.model_card import model_card
from training.common.models import open_point_model
from training.common.process import warn_of_missing_processes
from training.common.rows import AvatarRows
from training.common.training_arguments import PretrainArguments
from training.pretraining.arguments import DataArguments, ModelArguments
from training.pretraining.metrics import baselines, decoder_parameters
from training.pretraining.trainer import PointillistTrainer
from training.pretraining.windows import EvaluationWindows, TrainWindows, collate_windows


def main() -> None:
    classes = (ModelArguments, DataArguments, PretrainArguments)
    model_arguments, data, arguments = parse_arguments(sys.argv[1:], *classes, description=__doc__)
    warn_of_missing_processes(arguments.world_size)
    checkpoint = checkpoint_to_resume(arguments.resume_from_checkpoint, arguments.output_dir)
    set_seed(arguments.seed)
    corpus = load_corpus(data.corpus)
    model = build_model(model_arguments, corpus)
    config = model.config

    head = load_head(data.head) if data.head else None
    train, heldout = (AvatarRows(corpus, split, model.input_names, head) for split in ("train", data.eval_split))
    window, grouped = config.window_tokens, config.level == "point"
    num_items = arguments.max_steps * arguments.items_per_step
    trainer = PointillistTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainWindows(
            train, window, num_items, arguments.seed, data.condition_dropout, grouped, data.context_noise
        ),
        eval_dataset=EvaluationWindows(heldout, window, data.max_eval_avatars, grouped),
        data_collator=partial(collate_windows, pad_token_id=config.pad_token_id, grouped=grouped),
    )
    sizes = f"{decoder_parameters(model) / 1e6:.1f} M parameters in the decoder, {get_model_param_count(model) / 1e6:.1f} M in all"
    about = f"{sizes}; {len(train)} avatars, {int(train.lengths.sum()):,} tokens; "
    metrics = trainer.train_and_evaluate(checkpoint, about, "windows")
    trainer.save_finished(partial(summarize, trainer, corpus, train, heldout, metrics))


def build_model(arguments: ModelArguments, corpus: Corpus) -> PointillistForCausalLM:
    """A new model for the corpus' vocabulary, or the checkpoint that `--model` names."""
    if arguments.model is None:
        config = arguments.config(corpus.tokenizer)
        config._attn_implementation = arguments.attn_implementation
        model = PointillistForCausalLM(config)
        if arguments.use_vision_encoder and arguments.vision_model:
            with flag_named("--vision_model", arguments.vision_model):
                vision = Dinov2Model.from_pretrained(arguments.vision_model, dtype=torch.float32)
            # The module itself, not a copy of its weights: under ZeRO-3 each process holds only a part of them.
            model.condition_encoder.use_vision(vision)
        return model
    options = {"attn_implementation": arguments.attn_implementation, "dtype": torch.float32}
    return open_point_model("--model", arguments.model, corpus, **options)


def summarize(
    trainer: PointillistTrainer, corpus: Corpus, train: AvatarRows, heldout: AvatarRows, metrics: dict[str, float]
) -> tuple[dict, str]:
    """Report and card of the trained model; prints the result."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    report = {
        "num_subjects": len(train) + len(heldout),
        "num_tokens": int(train.lengths.sum() + heldout.lengths.sum()),
        "num_parameters": decoder_parameters(model),
        "steps": trainer.state.global_step,
        **trainer.first_and_last_loss(),
        "heldout_nll": metrics["eval_nll"],
        **baselines(train, heldout),
        **{name.replace("eval_", "heldout_"): value for name, value in metrics.items() if name.startswith("eval_")},
    }
    print(
        f"held-out NLL {report['heldout_nll']:.3f} nats per token (unigram {report['unigram_nll']:.3f}, "
        f"uniform {report['uniform_nll']:.3f}); model in {trainer.args.output_dir}"
    )
    return report, model_card("point_model", corpus, config=model.config, report=report, arguments=trainer.args)


if __name__ == "__main__":
    exit_on_user_error(main)
