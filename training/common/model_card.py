"""The README.md that lies beside a trained model: what it is, what it was trained on, how it did, how to use it."""

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from gaussian_tokenizer.corpus.card import HUB_LICENSES
from gaussian_tokenizer.corpus.corpus import Corpus
from modeling import GaussianDecoderConfig, PointillistConfig

SLOTS = ("x", "y", "z", "face")


def hub_license(corpus: Corpus) -> str:
    """The license that all training subjects share, as the Hub calls it; "other" where they differ or it knows no such one."""
    found = {license.lower() for license in corpus.avatars("train")["license"]}
    license = found.pop() if len(found) == 1 else "other"
    return license if license in HUB_LICENSES else "other"


def model_card(config: PointillistConfig, corpus: Corpus, report: dict, arguments: TrainingArguments) -> str:
    """Markdown with a YAML header."""
    header = ModelCardData(
        license=hub_license(corpus),
        library_name="transformers",
        tags=["avatar-pointillist", "gaussian-splatting", "3d", "avatars"],
        pipeline_tag="image-to-3d",
    ).to_yaml()
    slots = "\n".join(
        f"| {slot} | {report[f'heldout_nll_{slot}']:.3f} | {report[f'heldout_perplexity_{slot}']:.1f} "
        f"| {report[f'heldout_accuracy_{slot}']:.1%} |"
        for slot in SLOTS
    )
    facts = {
        "decoder": f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{report['num_parameters'] / 1e6:.1f} M parameters",
        "vocabulary": f"{config.n_bins} levels an axis, {config.n_faces} faces, "
        f"head model {corpus.tokenizer.head_name or 'unknown'}",
        "window": f"{config.sliding_window} tokens",
        "training data": f"{corpus.path.name}: {report['num_subjects']} subjects, {report['num_tokens']:,} tokens; "
        "licenses and consent in its card",
        "training": f"{report['steps']} steps, learning rate {arguments.learning_rate}, "
        f"{arguments.per_device_train_batch_size} windows a device, {arguments.world_size} devices",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    return f"""---
{header}
---

# Autoregressive point model for Gaussian avatars

Writes the canonical point cloud of a head avatar, four tokens a point (x, y, z, face), from a portrait and a head mesh.
An open implementation of the autoregressive half of AvatarPointillist (CVPR 2026).

| | |
|---|---|
{table}

## Held-out negative log-likelihood, nats a token

All {report["heldout_nll"]:.3f}; by token frequencies alone (unigram) {report["unigram_nll"]:.3f}; uniform
{report["uniform_nll"]:.3f}.

| slot | NLL | perplexity | accuracy |
|---|---|---|---|
{slots}

## Use

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_ID", trust_remote_code=True)
tokenizer = AutoProcessor.from_pretrained("THIS_FOLDER_OR_ID", trust_remote_code=True)
inputs = tokenizer(images=portrait, head_vertices=vertices, head_faces=faces, return_tensors="pt")
points = tokenizer.decode(model.generate(**inputs)[0])  # positions (N, 3) meters, faces (N,)
```

A generated head shows no real person unless it was asked to: do not make one of somebody who has not agreed to it.
"""


def decoder_card(config: GaussianDecoderConfig, corpus: Corpus, report: dict, arguments: TrainingArguments) -> str:
    """The same for a Gaussian decoder."""
    facts = {
        "decoder": f"{config.num_hidden_layers} joint-attention blocks, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {report['num_parameters'] / 1e6:.1f} M parameters",
        "reads": config.mode,
        "training data": f"{corpus.path.name}; licenses and consent in its card",
        "training": f"{report['steps']} steps, learning rate {arguments.learning_rate}, "
        f"{arguments.per_device_train_batch_size} subjects a device, {arguments.world_size} devices",
        "held-out frames": f"PSNR {report['heldout_psnr']:.2f} dB, SSIM {report['heldout_ssim']:.3f} (from true points)",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    header = ModelCardData(
        license=hub_license(corpus),
        library_name="transformers",
        tags=["avatar-pointillist", "gaussian-splatting", "3d", "avatars"],
        pipeline_tag="image-to-3d",
    ).to_yaml()
    return f"""---
{header}
---

# Gaussian decoder for avatars

Gives the points that the autoregressive point model wrote their color, opacity, scale, rotation and offset, from a portrait.
An open implementation of the Gaussian decoder of AvatarPointillist (CVPR 2026).

| | |
|---|---|
{table}

Use it with its point model, tokenizer and head model as an `AvatarPipeline`. A generated head shows no real person unless it was
asked to: do not make one of somebody who has not agreed to it.
"""
