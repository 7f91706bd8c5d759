"""Train the Gaussian decoder on a corpus with frames, behind a frozen point model.

    accelerate launch training/train_gaussian_decoder.py training/configs/decoder_debug.yaml \\
        --point_model MODEL --corpus CORPUS --head procedural:600                                       # seconds on a CPU
    accelerate launch --config_file accelerate_config.yaml training/train_gaussian_decoder.py \\
        training/configs/decoder_paper.yaml --point_model MODEL --corpus CORPUS --head flame.safetensors \\
        --lpips_weights vgg16-397923af.pth
    ... --resume_from_checkpoint true                                                                   # go on exactly

Every field of the YAML file can be given again on the command line. The output folder holds a decoder that
`GaussianDecoder.from_pretrained` opens, a model card and `training_report.json`.
"""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_pt_utils import get_model_param_count

from gaussian_tokenizer.avatars.skinning import ANIMATIONS
from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from modeling import GaussianDecoder, PointillistForCausalLM
from modeling.point_features import FeatureCache
from training.common.arguments import exit_on_user_error, flag_named, parse_arguments
from training.common.exact_trainer import checkpoint_to_resume, going_on_from
from training.common.model_card import decoder_card
from training.common.process import warn_of_missing_processes
from training.decoder.arguments import DecoderArguments, DecoderTrainingArguments, FrameArguments, LossArguments
from training.decoder.generated_sequences import generated_sequences
from training.decoder.losses import PerceptualLoss
from training.decoder.subjects import (
    EvaluationSubjects,
    SubjectRows,
    TrainSubjects,
    collate_subjects,
    mean_images,
    on_background,
)
from training.decoder.trainer import DecoderTrainer, LossWeights


def main() -> None:
    decoder_arguments, frames, losses, arguments = parse_arguments(
        sys.argv[1:],
        DecoderArguments,
        FrameArguments,
        LossArguments,
        DecoderTrainingArguments,
        description=__doc__.split("\n\n")[0],
    )
    if arguments.max_steps < 1:
        raise ValueError(
            f"--max_steps must say how long to train, found {arguments.max_steps} (epochs are not counted)"
        )
    if frames.num_targets < 1:
        raise ValueError(f"--num_targets must be at least 1, found {frames.num_targets}")
    if not 0 <= frames.self_generated_ratio <= 1:
        raise ValueError(f"--self_generated_ratio is a share, 0 to 1, found {frames.self_generated_ratio}")
    if frames.animation not in ANIMATIONS:
        raise ValueError(f"--animation {frames.animation}: expected {' or '.join(ANIMATIONS)}")
    warn_of_missing_processes(arguments.world_size)
    checkpoint = checkpoint_to_resume(arguments.resume_from_checkpoint, arguments.output_dir)
    set_seed(arguments.seed)
    corpus = load_corpus(frames.corpus)
    head = load_head(frames.head)
    check_head(corpus, head, frames.head)
    point_model = open_point_model(decoder_arguments.point_model, corpus)
    perceptual = perceptual_loss(losses)
    model = build_decoder(decoder_arguments, point_model, corpus)

    use_heads = point_model.config.use_point_encoder
    train = SubjectRows(corpus, "train", use_heads)
    heldout = SubjectRows(corpus, frames.eval_split, use_heads, frames.max_eval_avatars)
    subjects_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    items = arguments.max_steps * subjects_a_step
    sequences: list[np.ndarray] = []
    if frames.self_generated_ratio:
        folder = Path(frames.feature_cache or arguments.output_dir) / "generated_sequences"
        sequences = generated_sequences(
            point_model.to(arguments.device), train, folder, arguments.seed, not arguments.disable_tqdm
        )
    trainer = DecoderTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainSubjects(
            train,
            items,
            frames.num_targets,
            arguments.seed,
            frames.random_source,
            sequences,
            frames.self_generated_ratio,
        ),
        eval_dataset=EvaluationSubjects(heldout, frames.max_eval_frames),
        data_collator=partial(collate_subjects, pad_token_id=point_model.config.pad_token_id),
        point_model=point_model,
        head=head,
        weights=LossWeights(losses.l1_weight, losses.ssim_weight, losses.lpips_weight, losses.offset_weight),
        perceptual=perceptual,
        cache=FeatureCache(frames.feature_cache, point_model) if frames.feature_cache else None,
        animation=frames.animation,
    )
    if trainer.is_world_process_zero():
        steps = (
            going_on_from(checkpoint, arguments.max_steps)
            if checkpoint
            else f"{arguments.max_steps} steps of {subjects_a_step} subjects"
        )
        print(
            f"{get_model_param_count(model) / 1e6:.1f} M parameters, mode {model.config.mode}; {len(train)} subjects with "
            f"{len(train.frames)} frames; {steps}, {frames.num_targets} frames of each",
            flush=True,
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    last = [entry for entry in trainer.state.log_history if "eval_psnr" in entry]
    metrics = last[-1] if last and last[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    baseline = mean_image_metrics(trainer.train_dataset.subjects, trainer.eval_dataset)
    save(trainer, model, corpus, metrics | baseline)


def check_head(corpus: Corpus, head: HeadModel, name: str) -> None:
    """Raise `ValueError` unless the corpus was made on this head model."""
    made_on = corpus.manifest["head"]
    if made_on["hash"] != head.hash:
        raise ValueError(
            f"the corpus {corpus.path} was made on head model {made_on['name']!r} (hash {made_on['hash']}), but --head "
            f"{name} has hash {head.hash}; give that head model"
        )


def open_point_model(name: str, corpus: Corpus) -> PointillistForCausalLM:
    """The frozen point model; `ValueError` if it spells points otherwise than the corpus."""
    with flag_named("--point_model", name):
        point_model = PointillistForCausalLM.from_pretrained(name)
    point_config, tokenizer = point_model.config, corpus.tokenizer
    if (point_config.n_bins, point_config.n_faces) != (tokenizer.n_bins, tokenizer.n_faces):
        raise ValueError(
            f"--point_model {name} spells points with {point_config.n_bins} levels and {point_config.n_faces} faces, the corpus "
            f"{corpus.path} with {tokenizer.n_bins} and {tokenizer.n_faces}; build the corpus with the model's tokenizer"
        )
    return point_model


def perceptual_loss(losses: LossArguments) -> PerceptualLoss | None:
    """LPIPS, or None where it is said to be left out."""
    if not losses.lpips_weight:
        print("note: trained without LPIPS (--lpips_weight 0), unlike the paper", file=sys.stderr, flush=True)
        return None
    if losses.lpips_weights is None:
        raise ValueError(
            f"--lpips_weight {losses.lpips_weight} needs the weights of its network: give --lpips_weights FILE (torchvision's "
            "vgg16-397923af.pth), or leave the perceptual loss out with --lpips_weight 0"
        )
    return PerceptualLoss(losses.lpips_weights)


def build_decoder(arguments: DecoderArguments, point_model: PointillistForCausalLM, corpus: Corpus) -> GaussianDecoder:
    """A new decoder behind this point model, or the one that `--decoder` names."""
    if arguments.decoder is None:
        config = arguments.config(point_model.config, corpus.tokenizer)
        config._attn_implementation = arguments.attn_implementation
        decoder = GaussianDecoder(config)
        if point_model.config.use_vision_encoder:
            decoder.use_vision(copy.deepcopy(point_model.condition_encoder.vision))
        return decoder
    with flag_named("--decoder", arguments.decoder):
        decoder = GaussianDecoder.from_pretrained(
            arguments.decoder, attn_implementation=arguments.attn_implementation, dtype=torch.float32
        )
    width = point_model.config.hidden_size
    if decoder.config.reads_point_features and decoder.config.point_feature_size != width:
        raise ValueError(
            f"--decoder {arguments.decoder} reads point features of width {decoder.config.point_feature_size}, the point model "
            f"has width {width}; give the point model it was trained with"
        )
    return decoder


def mean_image_metrics(train: SubjectRows, heldout: EvaluationSubjects) -> dict[str, float]:
    """PSNR and SSIM of the mean training image of each camera over the held-out frames that show one of its images."""
    means = mean_images(train)
    values = []
    for row in range(len(heldout)):
        for frame in heldout.frame_rows(row):
            mean = means.get(heldout.subjects.frames[frame]["camera"])
            if mean is not None:
                truth = on_background(torch.from_numpy(heldout.subjects.targets([frame])["images"]), torch.ones(1))
                values.append(torch.cat((psnr(mean[None], truth), ssim(mean[None], truth))))
    if not values:
        return {}
    mean_psnr, mean_ssim = torch.stack(values).mean(0).tolist()
    return {"psnr_mean_image": mean_psnr, "ssim_mean_image": mean_ssim}


def save(trainer: DecoderTrainer, model: GaussianDecoder, corpus: Corpus, metrics: dict) -> None:
    """Decoder, card and report into the output folder."""

    def write_more(folder: Path) -> None:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        report = {
            "mode": model.config.mode,
            "steps": trainer.state.global_step,
            "num_parameters": get_model_param_count(model),
            "train_loss_first": losses[0] if losses else None,
            "train_loss_last": losses[-1] if losses else None,
            "heldout_psnr": metrics["eval_psnr"],
            "heldout_ssim": metrics["eval_ssim"],
            **{name: value for name, value in metrics.items() if name.endswith("mean_image")},
        }
        (folder / "README.md").write_text(decoder_card(model.config, corpus, report, trainer.args))
        (folder / "training_report.json").write_text(json.dumps(report, indent=2))
        (folder / "training_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        print(
            f"held-out frames drawn from true points: PSNR {report['heldout_psnr']:.2f} dB, SSIM {report['heldout_ssim']:.3f} "
            f"(mean image {report.get('psnr_mean_image', float('nan')):.2f} dB); decoder in {trainer.args.output_dir}"
        )

    trainer.save_finished(write_more)


if __name__ == "__main__":
    exit_on_user_error(main)
