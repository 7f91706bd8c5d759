"""Train the Gaussian decoder on a corpus with frames, behind a frozen point model.

    accelerate launch training/train_gaussian_decoder.py training/configs/decoder_debug.yaml \\
        --point_model MODEL --corpus CORPUS --head procedural:600                                       # seconds on a CPU
    accelerate launch --config_file accelerate_config.yaml training/train_gaussian_decoder.py \\
        training/configs/decoder_paper.yaml --point_model MODEL --corpus CORPUS --head flame.safetensors \\
        --lpips_weights vgg16-397923af.pth
    ... --resume_from_checkpoint true                                                                   # resume exactly

The output folder holds a decoder that `GaussianDecoder.from_pretrained` opens, a model card and `training_report.json`. Every
field of the YAML file can also be given on the command line.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_pt_utils import get_model_param_count

from gaussian_tokenizer.avatars.avatar_files import check_hash
from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from modeling import GaussianDecoder, PointillistForCausalLM
from modeling.checks import check_width
from modeling.point_features import FeatureCache
from training.common.arguments import exit_on_user_error, flag_named, parse_arguments
from training.common.exact_trainer import checkpoint_to_resume
from training.common.model_card import model_card
from training.common.models import open_point_model
from training.common.process import warn_of_missing_processes
from training.decoder.arguments import DecoderArguments, DecoderTrainingArguments, FrameArguments, LossArguments
from training.decoder.generated_sequences import generated_sequences
from training.decoder.losses import PerceptualLoss
from training.decoder.subjects import (
    EvaluationSubjects,
    SubjectRows,
    TrainSubjects,
    collate_subjects,
    mean_image_metrics,
    mean_images,
)
from training.decoder.trainer import DecoderTrainer


def main() -> None:
    classes = (DecoderArguments, FrameArguments, LossArguments, DecoderTrainingArguments)
    decoder_arguments, frames, losses, arguments = parse_arguments(sys.argv[1:], *classes, description=__doc__)
    warn_of_missing_processes(arguments.world_size)
    checkpoint = checkpoint_to_resume(arguments.resume_from_checkpoint, arguments.output_dir)
    set_seed(arguments.seed)
    corpus = load_corpus(frames.corpus)
    head = load_head(frames.head)
    made_on = corpus.manifest["head"]
    check_hash(f"--head {frames.head}: the corpus {corpus.path}", made_on["name"], made_on["hash"], head)
    point_model = open_point_model("--point_model", decoder_arguments.point_model, corpus)
    reads_portrait = {"pixel_values", "face_pixels"} & set(point_model.input_names)
    if frames.augment_portraits and frames.feature_cache and reads_portrait:
        raise ValueError(
            "--feature_cache with --augment_portraits would fill the disk: the point model reads the portrait, which is another "
            "one in every item; leave out one of the two"
        )
    perceptual = perceptual_loss(losses)
    model = build_decoder(decoder_arguments, point_model, corpus)
    reads = model.config.read_portrait
    if frames.num_references > 1 and not reads:
        raise ValueError(f"--num_references {frames.num_references} is for a decoder with --read_portrait true")
    heldout = SubjectRows(corpus, frames.eval_split, point_model.input_names, frames.max_eval_avatars, reads, head)
    trainer = DecoderTrainer(
        model=model,
        args=arguments,
        train_dataset=train_subjects(corpus, frames, arguments, point_model, reads, head),
        eval_dataset=EvaluationSubjects(heldout, frames.max_eval_frames, frames.num_references),
        data_collator=partial(collate_subjects, pad_token_id=point_model.config.pad_token_id),
        point_model=point_model,
        head=head,
        losses=losses,
        perceptual=perceptual,
        cache=FeatureCache(frames.feature_cache, point_model) if frames.feature_cache else None,
        animation=frames.animation,
    )
    subjects = trainer.train_dataset.subjects
    about = f"{get_model_param_count(model) / 1e6:.1f} M parameters, mode {model.config.mode}; "
    about += f"{len(subjects)} subjects with {len(subjects.frames)} frames; "
    metrics = trainer.train_and_evaluate(checkpoint, about, f"subjects, {frames.num_targets} frames of each")
    trainer.save_finished(partial(summarize, trainer, corpus, metrics))


def train_subjects(
    corpus: Corpus,
    frames: FrameArguments,
    arguments: DecoderTrainingArguments,
    point_model: PointillistForCausalLM,
    read_portrait: bool,
    head: HeadModel,
) -> TrainSubjects:
    """The training set, with sequences of the point model where the arguments ask for them."""
    subjects = SubjectRows(corpus, "train", point_model.input_names, None, read_portrait, head)
    sequences: list[np.ndarray] = []
    if frames.self_generated_ratio:
        folder = Path(frames.feature_cache or arguments.output_dir) / "generated_sequences"
        point_model.to(arguments.device)
        first = SubjectRows(corpus, "train", point_model.input_names, frames.max_self_generated, False, head)
        sequences = generated_sequences(point_model, first, folder, arguments.seed, not arguments.disable_tqdm)
    each = arguments.items_per_step
    drawn = (arguments.max_steps * each, frames.num_targets, arguments.seed, frames.random_source)
    generated = (sequences, frames.self_generated_ratio)
    read = (frames.num_references, each, frames.augment_portraits)
    return TrainSubjects(subjects, *drawn, *generated, *read)


def perceptual_loss(losses: LossArguments) -> PerceptualLoss | None:
    """LPIPS, or None if its weight is 0."""
    if not losses.lpips_weight:
        print("note: trained without LPIPS (--lpips_weight 0), unlike the paper", file=sys.stderr, flush=True)
        return None
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
    check_width(decoder.config, point_model.config, f"--decoder {arguments.decoder}")
    return decoder


def summarize(trainer: DecoderTrainer, corpus: Corpus, metrics: dict[str, float]) -> tuple[dict, str]:
    """Report and card of the trained decoder; prints the result."""
    config = trainer.accelerator.unwrap_model(trainer.model).config
    report = {
        "mode": config.mode,
        "steps": trainer.state.global_step,
        "num_parameters": get_model_param_count(trainer.model),
        **trainer.first_and_last_loss(),
        "heldout_psnr": metrics["eval_psnr"],
        "heldout_ssim": metrics["eval_ssim"],
    }
    if "eval_coverage" in metrics:
        report["heldout_coverage"] = metrics["eval_coverage"]
    means, heldout = mean_images(trainer.train_dataset.subjects), trainer.eval_dataset
    rows = [mean_image_metrics(means, heldout.subjects, heldout.frame_rows(row)) for row in range(len(heldout))]
    baseline = torch.cat([torch.stack(values, 1) for values in rows])
    if len(baseline):
        report |= dict(zip(("psnr_mean_image", "ssim_mean_image"), baseline.mean(0).tolist()))
    print(
        f"held-out frames rendered from true points: PSNR {report['heldout_psnr']:.2f} dB, SSIM {report['heldout_ssim']:.3f}, "
        f"coverage {report.get('heldout_coverage', float('nan')):.3f} "
        f"(mean image {report.get('psnr_mean_image', float('nan')):.2f} dB); decoder in {trainer.args.output_dir}"
    )
    return report, model_card("gaussian_decoder", corpus, config=config, report=report, arguments=trainer.args)


if __name__ == "__main__":
    exit_on_user_error(main)
