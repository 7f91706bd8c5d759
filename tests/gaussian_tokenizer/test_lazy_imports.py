"""What the package offers comes when it is used, and with `GaussianTokenizer` comes its registration with `AutoProcessor`."""

import subprocess
import sys

import pytest

from gaussian_tokenizer import GaussianTokenizer


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_offered_is_there():
    assert python("from gaussian_tokenizer import *; print(GaussianAvatar.__name__, load_corpus.__name__)") == (
        "GaussianAvatar load_corpus"
    )
    assert python("import gaussian_tokenizer as g; print(all(getattr(g, name) for name in g.__all__))") == "True"


def test_importing_the_package_leaves_the_import_system_as_it_was():
    assert (
        python("import sys; before = list(sys.meta_path); import gaussian_tokenizer; print(sys.meta_path == before)")
        == "True"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import gaussian_tokenizer",
        "from gaussian_tokenizer import GaussianAvatar, find_trackings, load_head, render",
        "import gaussian_tokenizer.animate",
        "import gaussian_tokenizer.captures.subject, training.fitting.optimization, training.fitting.report",
    ],
)
def test_avatars_captures_and_fits_need_neither_transformers_nor_datasets(imports):
    assert not {"transformers", "datasets"} & set(python(f"import sys; {imports}; print(*sys.modules)").split())


def test_the_arithmetic_of_tokens_needs_numpy_alone():
    code = "import sys; import gaussian_tokenizer.tokenizer.point_codec; print(*sys.modules)"
    assert not {"transformers", "torch", "PIL"} & set(python(code).split())


@pytest.mark.parametrize(
    "imports",
    [
        "from gaussian_tokenizer import GaussianTokenizer; from transformers import AutoProcessor",
        "from transformers import AutoProcessor; from gaussian_tokenizer import GaussianTokenizer",
        "import modeling; from transformers import AutoProcessor",
        # A probe for the module, as other packages make to see what is installed.
        "import importlib.util, gaussian_tokenizer; importlib.util.find_spec('transformers.models.auto.processing_auto'); "
        "from transformers import AutoProcessor; gaussian_tokenizer.GaussianTokenizer",
    ],
)
def test_auto_processor_knows_the_tokenizer_once_it_is_imported(imports, tmp_path):
    GaussianTokenizer(n_bins=32, n_faces=20).save_pretrained(tmp_path)
    code = f"{imports}; print(type(AutoProcessor.from_pretrained({str(tmp_path)!r})).__module__)"
    assert python(code) == "gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer"
