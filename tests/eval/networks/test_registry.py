"""The networks behind the metrics: missing ones give a reason, wrong files are errors, available ones compute the right numbers.

No pretrained weights are needed: networks get random ones here. Tests of packages that are not installed are skipped.
"""

import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from eval.metrics.functional import cosine_similarity
from eval.networks.faces import (
    ARCFACE_FIVE,
    ARCFACE_TEMPLATE,
    LANDMARK_MEMBERS,
    MESH_68,
    aligned_face,
    check_task_file,
    five_points,
    nearest_rotation,
    reading_of,
    similarity,
)
from eval.networks.registry import OPENERS, NetworkOptions, open_networks
from eval.networks.weights import Missing, batches, read_state_dict

WEIGHTS_FLAGS = ("lpips_weights", "inception_weights", "landmark_weights", "clip_model", "arcface_weights")


@pytest.fixture(autouse=True)
def no_downloaded_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 72, 64, 3), dtype=np.uint8)


def torchvision():
    try:
        import torchvision
    except (ImportError, RuntimeError):
        pytest.skip("no torchvision for this torch")
    return torchvision


def test_without_weights_every_network_is_missing_and_names_its_flag():
    networks = vars(open_networks(NetworkOptions()))
    assert list(networks) == list(OPENERS)
    for missing, flag in zip(networks.values(), WEIGHTS_FLAGS):
        assert isinstance(missing, Missing)
        assert f"--{flag}" in missing.remedy
        assert "given" in missing.reason


@pytest.mark.parametrize("flag", WEIGHTS_FLAGS)
def test_weights_that_do_not_exist_are_an_error_that_names_flag_and_file(flag, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"--{flag} .*gone"):
        open_networks(NetworkOptions(**{flag: str(tmp_path / "gone")}))


@pytest.mark.parametrize(
    ("name", "flag", "package"),
    [("lpips", "lpips_weights", "lpips"), ("inception", "inception_weights", "torch_fidelity"),
     ("face", "landmark_weights", "mediapipe"), ("arcface", "arcface_weights", "onnxruntime")],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(
    name, flag, package, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "weights").write_bytes(b"")
    missing = OPENERS[name](NetworkOptions(**{flag: str(tmp_path / "weights")}))
    assert isinstance(missing, Missing)
    assert "pip install " in missing.remedy and package.replace("_", "-") in missing.remedy


def test_an_unknown_backbone_of_lpips_is_refused():
    with pytest.raises(ValueError, match="'resnet': expected one of alex, vgg"):
        open_networks(NetworkOptions(lpips_net="resnet"))


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write_code(path: Path, marker: Path) -> None:
    torch.save({"fc.weight": Bomb(marker)}, path)


def write_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def write_torchscript(path: Path, marker: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def write_text(path: Path, marker: Path) -> None:
    path.write_text("404: Not Found")


def write_list(path: Path, marker: Path) -> None:
    torch.save([torch.zeros(1)], path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_code, write_pickle, write_torchscript, write_text, write_list])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_not_plain_tensors_are_refused_and_never_run(write, suffix, tmp_path):
    path, marker = tmp_path / f"weights{suffix}", tmp_path / "ran"
    write(path, marker)
    with pytest.raises(ValueError, match=rf"--flag .*weights{suffix}: .*; expected a network$") as error:
        read_state_dict(path, "--flag", "a network")
    assert not marker.exists() and "\n" not in str(error.value)


def test_plain_tensors_are_read_from_both_formats(tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        torch.testing.assert_close(read_state_dict(tmp_path / name, "--flag", "a network"), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_of_another_network_are_named_with_what_was_found_and_expected(suffix, tmp_path):
    path, state = tmp_path / f"w{suffix}", {"conv.weight": torch.zeros(2, 3)}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    read_state_dict(path, "--flag", "a network", {"conv.weight": (2, 3)})
    with pytest.raises(ValueError, match=r"--flag .*: conv.weight is \(2, 3\), not \(4, 3\); expected a network"):
        read_state_dict(path, "--flag", "a network", {"conv.weight": (4, 3)})
    with pytest.raises(ValueError, match=r": has no tensor fc.bias among its 1 \(the first is conv.weight\)"):
        read_state_dict(path, "--flag", "a network", {"fc.bias": (4,)})


def test_batches_are_the_images_in_order_and_other_arrays_are_refused():
    stack = np.arange(19 * 2 * 4 * 3, dtype=np.uint32).reshape(19, 2, 4, 3).astype(np.uint8)
    parts = [part for (part,) in batches(stack)]
    np.testing.assert_array_equal(torch.cat(parts).permute(0, 2, 3, 1), stack)
    with pytest.raises(ValueError, match=r"\(19, 2, 4, 3\) uint8, \(18, 2, 4, 3\) uint8"):
        list(batches(stack, stack[1:]))
    with pytest.raises(ValueError, match="float64"):
        list(batches(stack / 255))


# CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def test_clip_features_are_those_of_the_model_worked_by_hand(clip_folder, images):
    from transformers import CLIPModel

    clip = OPENERS["clip"](NetworkOptions(clip_model=str(clip_folder)))
    features = clip(images)
    assert features.shape == (3, 12) and features.dtype == np.float64
    model = CLIPModel.from_pretrained(clip_folder).eval()
    for image, found in zip(images, features):
        small = np.asarray(Image.fromarray(image).resize((32, 36), Image.Resampling.BICUBIC))[
            2:34
        ]  # shorter side, middle
        pixels = (small / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        with torch.no_grad():
            seen = model.vision_model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
            expected = seen.pooler_output @ model.visual_projection.weight.T
        np.testing.assert_allclose(found, expected[0], atol=1e-5)
    np.testing.assert_allclose(cosine_similarity(features, clip(images)), 1)
    assert not np.allclose(features[0], features[1], atol=1e-2)


def test_clip_describes_its_weights_by_hash(clip_folder):
    import hashlib

    about = OPENERS["clip"](NetworkOptions(clip_model=str(clip_folder))).about
    assert set(about) == {"name", "package", "version", "weights", "sha256"}
    assert about["sha256"] == hashlib.sha256((clip_folder / "model.safetensors").read_bytes()).hexdigest()
    assert (about["package"], about["weights"]) == ("transformers", "model.safetensors")


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_folder_that_is_no_clip_is_named_before_anything_is_computed(clip_folder, tmp_path, capfd):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def refused(folder, match):
        with pytest.raises(ValueError, match=match):
            OPENERS["clip"](NetworkOptions(clip_model=str(folder)))

    vision = tmp_path / "vision"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    network.save_pretrained(vision)
    refused(vision, "config.json says model_type 'clip_vision_model', not 'clip'")

    partial = copied(clip_folder, tmp_path / "partial")
    save_file(network.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    refused(partial, r"model.safetensors lacks \d+ tensors of the model")
    assert capfd.readouterr() == ("", "")  # one error, no table beside it

    resized = copied(clip_folder, tmp_path / "resized")
    config = (resized / "config.json").read_text()
    (resized / "config.json").write_text(config.replace('"projection_dim": 12', '"projection_dim": 10'))
    refused(resized, "does not fit config.json")

    cut = copied(clip_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    refused(cut, "model.safetensors does not fit")

    pickled = copied(clip_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    write_code(pickled / "pytorch_model.bin", tmp_path / "ran")
    refused(pickled, "pytorch_model.bin does not fit")
    assert not (tmp_path / "ran").exists()

    bare = copied(clip_folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    refused(bare, r"holds config.json, model.safetensors; expected")
    refused(tmp_path, "model_type None")


# Faces


def result_of(mesh, matrix, scores):
    """What FaceLandmarker returns for one face, in its own words."""
    return SimpleNamespace(
        face_landmarks=[[SimpleNamespace(x=x, y=y) for x, y in mesh]],
        facial_transformation_matrixes=[matrix],
        face_blendshapes=[[SimpleNamespace(score=score) for score in scores]],
    )


NO_FACE = SimpleNamespace(face_landmarks=[], facial_transformation_matrixes=[], face_blendshapes=[])


def test_a_face_is_read_into_pixels_rotation_and_expression_and_none_into_nan():
    rng = np.random.default_rng(0)
    mesh, turn, scores = rng.random((478, 2)), Rotation.random(rng=rng).as_matrix(), rng.random(52)
    matrix = np.eye(4)
    matrix[:3] = np.concatenate((1.02 * turn, [[1], [2], [-40]]), axis=1)
    reading = reading_of([NO_FACE, result_of(mesh, matrix, scores)], height=100, width=200)
    for values in (reading.landmarks, reading.rotations, reading.expressions):
        assert np.isnan(values[0]).all() and np.isfinite(values[1]).all()
    np.testing.assert_allclose(reading.landmarks[1, 30], mesh[4] * [200, 100])  # the tip of the nose
    np.testing.assert_allclose(reading.rotations[1], turn, atol=1e-12)
    np.testing.assert_array_equal(reading.expressions[1], scores)


def test_the_68_points_are_those_of_ibug_on_mediapipes_mesh():
    assert len(MESH_68) == len(set(MESH_68)) == 68
    vision = pytest.importorskip("mediapipe.tasks.python.vision")
    mesh = vision.FaceLandmarksConnections

    def vertices(connections):
        return {end for line in connections for end in (line.start, line.end)}

    points = np.array(MESH_68)
    parts = [
        (slice(0, 17), mesh.FACE_LANDMARKS_FACE_OVAL),
        (slice(17, 22), mesh.FACE_LANDMARKS_RIGHT_EYEBROW),  # the subject's right is left in the image
        (slice(22, 27), mesh.FACE_LANDMARKS_LEFT_EYEBROW),
        (slice(27, 36), mesh.FACE_LANDMARKS_NOSE),
        (slice(36, 42), mesh.FACE_LANDMARKS_RIGHT_EYE),
        (slice(42, 48), mesh.FACE_LANDMARKS_LEFT_EYE),
        (slice(48, 68), mesh.FACE_LANDMARKS_LIPS),
    ]
    for part, connections in parts:
        assert set(points[part]) <= vertices(connections), part


def test_nearest_rotation_is_proper_and_forgets_the_scale():
    turn = Rotation.random(rng=0).as_matrix()
    np.testing.assert_allclose(nearest_rotation(3 * turn), turn, atol=1e-12)
    assert np.linalg.det(nearest_rotation(turn @ np.diag([1, 1, -1e-3]))) == pytest.approx(1)


def test_a_file_that_is_no_face_landmarker_is_named_with_what_it_holds(tmp_path):
    path = tmp_path / "other.task"
    path.write_text("404: Not Found")
    with pytest.raises(
        ValueError, match=r"other.task: not an archive of networks; expected MediaPipe's face_landmarker.task"
    ):
        check_task_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hand_detector.tflite", b"")
    with pytest.raises(ValueError, match=r"holds hand_detector.tflite, but not face_detector.tflite"):
        check_task_file(path)


def test_networks_that_mediapipe_refuses_are_an_error_that_names_the_file(tmp_path):
    pytest.importorskip("mediapipe")
    path = tmp_path / "broken.task"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in LANDMARK_MEMBERS:
            archive.writestr(name, b"not a network")
    with pytest.raises(ValueError, match=r"--landmark_weights .*broken.task: rejected by mediapipe"):
        OPENERS["face"](NetworkOptions(landmark_weights=str(path)))


def test_similarity_agrees_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    source, target = np.random.default_rng(0).normal(size=(2, 5, 2))
    matrix, shift = similarity(source, target)
    expected = transform.SimilarityTransform.from_estimate(source, target).params
    np.testing.assert_allclose(np.concatenate((matrix, shift[:, None]), 1), expected[:2], atol=1e-12)


def test_an_aligned_face_has_eyes_nose_and_mouth_where_arcface_expects_them():
    """An image whose colors are a linear function of the place keeps it under any similarity."""
    x, y = np.meshgrid(np.arange(300) + 0.5, np.arange(260) + 0.5)
    image = np.stack((x * 0.8, y * 0.9, 0 * x), -1).astype(np.uint8)
    turn = 1.4 * Rotation.from_euler("z", 20, degrees=True).as_matrix()[:2, :2]
    points = (ARCFACE_TEMPLATE - 56) @ turn.T + [140, 120]
    crop = aligned_face(image, points)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    for place, (row, column) in zip(points, np.floor(ARCFACE_TEMPLATE[:, ::-1]).astype(int)):
        np.testing.assert_allclose(crop[row, column, :2] / [0.8, 0.9], place, atol=3)


def test_aligned_faces_agree_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    image = np.random.default_rng(0).integers(0, 256, (300, 320, 3), dtype=np.uint8)
    turn = 1.3 * Rotation.from_euler("z", -25, degrees=True).as_matrix()[:2, :2]
    points = (ARCFACE_TEMPLATE - 56) @ turn.T + [150, 160] + np.random.default_rng(1).normal(size=(5, 2))
    # scikit-image and InsightFace count from pixel centers
    back = transform.SimilarityTransform.from_estimate(ARCFACE_FIVE, points - 0.5)
    expected = transform.warp(image.astype(float), back, output_shape=(112, 112), order=1)
    assert np.abs(aligned_face(image, points) - expected).max() <= 0.51


def test_a_crop_is_black_outside_the_image():
    crop = aligned_face(np.full((60, 60, 3), 255, np.uint8), ARCFACE_TEMPLATE)
    assert (crop[:60, :60] == 255).all() and (crop[61:] == 0).all() and (crop[:, 61:] == 0).all()


def test_five_points_are_eye_centers_nose_and_mouth_corners():
    landmarks = np.zeros((1, 68, 2))
    landmarks[0, 36:42, 0], landmarks[0, 42:48, 0] = np.arange(6), np.arange(6) + 10
    landmarks[0, 30], landmarks[0, 48], landmarks[0, 54] = (7, 8), (4, 20), (12, 20)
    np.testing.assert_array_equal(five_points(landmarks)[0], [(2.5, 0), (12.5, 0), (7, 8), (4, 20), (12, 20)])


def onnx_file(path: Path, size: int = 112, width: int = 512, batch: str | int = "N") -> np.ndarray:
    """Write a network that maps the mean color of its image by a matrix, which is returned."""
    onnx = pytest.importorskip("onnx")
    matrix = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        onnx.helper.make_node("Flatten", ["mean"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "matrix"], ["features"]),
    ]
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [tensor("image", onnx.TensorProto.FLOAT, [batch, 3, size, size])],
        [tensor("features", onnx.TensorProto.FLOAT, [batch, width])],
        [onnx.numpy_helper.from_array(matrix, "matrix")],
    )
    opset = onnx.helper.make_opsetid("", 13)
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())
    return matrix


def landmarks_at(points: np.ndarray) -> np.ndarray:
    landmarks = np.zeros((68, 2))
    landmarks[36:42], landmarks[42:48], landmarks[30], landmarks[48], landmarks[54] = points
    return landmarks


@pytest.mark.parametrize("batch", ["N", 1])
def test_arcface_reads_the_aligned_crop_and_gives_nan_without_a_face(batch, tmp_path):
    pytest.importorskip("onnxruntime")
    from eval.networks.faces import ArcFace

    matrix = onnx_file(tmp_path / "arcface.onnx", batch=batch)
    images = np.random.default_rng(1).integers(0, 256, (2, 150, 140, 3), dtype=np.uint8)
    landmarks = np.stack([landmarks_at(ARCFACE_TEMPLATE + np.array([10, 20])), np.full((68, 2), np.nan)])
    arcface = ArcFace(tmp_path / "arcface.onnx", "cpu")
    features = arcface(images, landmarks)
    crop = images[0, 20:132, 10:122].astype(np.float64)
    expected = ((crop - 127.5) / 127.5).mean((0, 1)) @ matrix
    np.testing.assert_allclose(features[0], expected, atol=1e-4)
    assert np.isnan(features[1]).all()
    assert arcface.about["package"] == "onnxruntime"


def test_onnx_files_of_other_networks_are_refused_even_without_landmarks(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    options = NetworkOptions(arcface_weights=str(path))
    onnx_file(path)
    missing = OPENERS["arcface"](options)
    assert isinstance(missing, Missing) and "--landmark_weights" in missing.remedy
    onnx_file(path, size=160)
    with pytest.raises(
        ValueError, match=r"network.onnx: maps \[\['N', 3, 160, 160\]\] to .*expected an ArcFace network"
    ):
        OPENERS["arcface"](options)
    onnx_file(path, width=128)
    with pytest.raises(ValueError, match=r"to \[\['N', 128\]\]"):
        OPENERS["arcface"](options)
    path.write_text("404: Not Found")
    with pytest.raises(ValueError, match=r"network\.onnx: not an ONNX network"):
        OPENERS["arcface"](options)


# LPIPS and Inception, where their packages are installed


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_published_formula_on_the_given_backbone(net, tmp_path, images):
    models = torchvision().models
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    backbone = {"alex": models.alexnet, "vgg": models.vgg16}[net](weights=None).eval()
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    state = torch.random.get_rng_state()
    lpips = OPENERS["lpips"](NetworkOptions(lpips_net=net, lpips_weights=str(tmp_path / "backbone.pth")))
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b = images, images[::-1].copy()
    found = lpips(a, b)

    taps = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[net]
    mean, deviation = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])  # of the published code
    streams = [
        torch.tensor((x / 127.5 - 1 - mean) / deviation, dtype=torch.float32).permute(0, 3, 1, 2) for x in (a, b)
    ]
    expected, tap = torch.zeros(3), 0
    with torch.no_grad():
        for index, layer in enumerate(backbone.features):
            streams = [layer(x) for x in streams]
            if index in taps:
                first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in streams)
                heads = lpips.network.lins[tap].model[-1].weight  # (1, C, 1, 1)
                expected += ((first - second).square() * heads).sum(1).mean((1, 2))
                tap += 1
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[0] > 0 and (lpips(a, a) == 0).all()
    assert lpips.about["package"] == "lpips"


def test_lpips_refuses_the_weights_of_the_other_backbone_and_tiny_images(tmp_path, images):
    models = torchvision().models
    pytest.importorskip("lpips")
    path = tmp_path / "backbone.pth"
    torch.save(models.alexnet(weights=None).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"--lpips_net vgg --lpips_weights .*features.0.weight is \(64, 3, 11, 11\).*VGG16"
    ):
        OPENERS["lpips"](NetworkOptions(lpips_net="vgg", lpips_weights=str(path)))
    lpips = OPENERS["lpips"](NetworkOptions(lpips_weights=str(path)))
    assert lpips(images[:, :32, :32], images[:, :32, :32]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 32 pixels a side, found 64x20"):
        lpips(images[:, :20], images[:, :20])


def random_inception():
    """torch-fidelity's network as it is before weights are loaded."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Bare("bare", ["2048"], feature_extractor_weights_path=empty)


def test_inception_gives_the_features_of_the_package(tmp_path, images):
    torchvision()
    pytest.importorskip("torch_fidelity")
    torch.manual_seed(0)
    network = random_inception()
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    inception = OPENERS["inception"](NetworkOptions(inception_weights=str(tmp_path / "inception.safetensors")))
    with torch.no_grad():
        (expected,) = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    features = inception(images)
    assert features.shape == (3, 2048)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)
    assert inception.about["package"] == "torch-fidelity"


def test_inception_refuses_torchvisions_and_cut_weights_and_runs_no_code(tmp_path):
    models = torchvision().models
    pytest.importorskip("torch_fidelity")
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    options = NetworkOptions(inception_weights=str(path))
    torch.save(models.inception_v3(weights=None, init_weights=False).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"fc.weight is \(1000, 2048\), not \(1008, 2048\); expected FID's InceptionV3"
    ):
        OPENERS["inception"](options)
    state = random_inception().state_dict()
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"weights.pth: .*Mixed_7c.branch_pool.conv.weight.*expected FID's InceptionV3"
    ):
        OPENERS["inception"](options)
    write_code(path, marker)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        OPENERS["inception"](options)
    assert not marker.exists()
