"""`AutoProcessor.from_pretrained` finds `GaussianTokenizer`, by the name in processor_config.json, among the registered classes.

Registering needs transformers' processors, which take two seconds to import. So it is done when somebody imports them.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PROCESSORS = "transformers.models.auto.processing_auto"


def register_when_needed() -> None:
    """Register now if `AutoProcessor` is there already, else as soon as it is."""
    if PROCESSORS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


class _Registrar(MetaPathFinder):
    """Finds nothing itself: it lets the usual finders load `PROCESSORS`, registers behind that, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PROCESSORS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from transformers import AutoProcessor

    from .processing_gaussian_tokenizer import GaussianTokenizer

    AutoProcessor.register("gaussian_tokenizer", GaussianTokenizer, exist_ok=True)
