"""Imports of torch and transformers without what no rank uses, which is more than half of the time.

For processes that are flexpert's own: what is replaced here behaves otherwise to whoever compiles
models with torch. Deferred modules are imported when something of them is asked for that has no
stand-in; a version of either library that does not have what is replaced is imported as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from flexpert.cluster.processes import caches

WHOLE = "FLEXPERT_WHOLE_IMPORTS"
"""Variable of the environment; set: nothing is left out."""

_SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
_META_KERNELS = "torch._meta_registrations"
"""With all operations once more, in Python; see `flexpert.models.meta_kernels` for who needs it."""

_WRAPPED = "torch._dynamo._trace_wrapped_higher_order_op"
Structure = dict[frozenset[str], dict[str, set[str]]]
"""As transformers has it: backends that are needed → module → the names in it."""


class DeferredModule(ModuleType):
    """Stands in for a module until anything but its stand-ins, or a module inside of it, is asked
    for. behind: deferred modules that are to be there before this one."""

    def __init__(
        self,
        name: str,
        stand_ins: Mapping[str, object] | None = None,
        *,
        package: bool = False,
        behind: Sequence[str] = (),
    ) -> None:
        super().__init__(name)
        self.__dict__.update(stand_ins or {})
        self._package = package
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" and self._package:
            return _LatePath(self)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> ModuleType:
        """The module itself, from now on in place of this one."""
        for name in self._behind:
            _whole(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        parent, _, last = self.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        return module


class _LatePath(Sequence[str]):
    """Of a deferred package, which is imported when somebody looks for a module inside of it: that
    it has a path is asked by whoever imports one of its names as well."""

    def __init__(self, package: DeferredModule) -> None:
        self._package = package

    def _path(self) -> Sequence[str]:
        found: Sequence[str] = self._package.whole().__path__
        return found

    def __getitem__(self, index: Any) -> Any:
        return self._path()[index]

    def __len__(self) -> int:
        return len(self._path())


class LateFunction:
    """Stands in for a function, or a class that is only called, of a deferred module."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self.__name__ = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_whole(self._module), self.__name__)(*args, **kwargs)

    def __or__(self, other: object) -> object:
        """In an annotation."""
        return Any


_UNUSED = (
    _META_KERNELS,
    "torch.masked",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.profiler",
    "torch.quantization",
    "torch.utils.data",
)
_HUB = {
    "huggingface_hub.hf_api": (
        "CommitOperationAdd",
        "HfApi",
        "get_repo_discussions",
        "upload_file",
    ),
    "huggingface_hub._snapshot_download": ("snapshot_download",),
}
"""Modules for who talks to the hub, and what of them transformers imports for its functions."""


def trim_imports() -> None:
    """Before either library is imported; later it does nothing."""
    if "torch" in sys.modules or "transformers" in sys.modules or os.environ.get(WHOLE):
        return
    _defer("torch.export", package=True)
    _defer("torch.export.decomp_utils", {"CustomDecompTable": dict})
    constraints = DeferredModule("torch.distributions.constraints")
    _defer("torch.distributions", {"constraints": constraints}, package=True)
    for name in _UNUSED:
        _defer(name, package=True)
    if importlib.util.find_spec("pynvml"):  # else torch is to see that there is none
        _defer("pynvml")
    for name, functions in _HUB.items():
        _defer(name, {each: LateFunction(name, each) for each in functions})
    torch = importlib.import_module("torch")
    torch.export = sys.modules["torch.export"]  # type: ignore[attr-defined]
    for name in _UNUSED:
        parent, _, last = name.rpartition(".")
        if last not in vars(sys.modules[parent]):
            setattr(sys.modules[parent], last, sys.modules[name])
    if hasattr(torch._C, "_set_generator_metaclass"):
        # a part of what `_meta_registrations` imports does so, and no generator is made before
        opaque = importlib.import_module("torch._opaque_base")
        torch._C._set_generator_metaclass(opaque.OpaqueBaseMeta)
    dynamo = {
        "allow_in_graph": _unchanged,
        "assume_constant_result": _unchanged,
        "disable": _not_disabled,
    }
    torch._dynamo = _defer(  # type: ignore[attr-defined]
        "torch._dynamo", dynamo, package=True, behind=(_META_KERNELS,)
    )
    _defer(_WRAPPED, {"TransformGetItemToIndex": _transform_get_item})
    _defer("sympy", {"Basic": _Symbol}, package=True)
    shapes = {name: _of_numbers(name, function) for name, function in _ON_NUMBERS.items()}
    _defer(_SYMBOLIC_SHAPES, shapes)
    with contextlib.suppress(ImportError, AttributeError):
        _trim_transformers()


def _defer(
    name: str,
    stand_ins: Mapping[str, object] | None = None,
    *,
    package: bool = False,
    behind: Sequence[str] = (),
) -> DeferredModule:
    sys.modules[name] = module = DeferredModule(name, stand_ins, package=package, behind=behind)
    return module


class _Symbol:
    """`sympy.Basic` where sizes are numbers: nothing is one."""


def _of_numbers(name: str, on_numbers: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's symbolic shapes for sizes and conditions, which are no symbols where
    nothing is traced: else it is asked itself."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if all(map(_is_plain, args)):
            return on_numbers(*args, **kwargs)
        return getattr(_whole(_SYMBOLIC_SHAPES), name)(*args, **kwargs)

    return function


def _whole(name: str) -> ModuleType:
    module = sys.modules[name]
    return module.whole() if isinstance(module, DeferredModule) else module


def _transform_get_item() -> Any:
    """A mode in which masks are made of functions that torch maps over; ours are not."""
    return _whole(_WRAPPED).TransformGetItemToIndex()


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) or (
        isinstance(value, list | tuple) and all(map(_is_plain, value))
    )


def _itself(condition: Any, *more: object, **message: object) -> Any:
    return condition


_ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "expect_true": _itself,
    "guard_int": int,
    "guard_or_false": _itself,
    "guard_or_true": _itself,
    "guard_size_oblivious": _itself,
    "guarding_hint_or_throw": _itself,
    "has_guarding_hint": lambda size: True,
    "is_nested_int": lambda size: False,
    "statically_known_true": _itself,
    "sym_and": lambda *conditions: all(conditions),
    "sym_eq": lambda one, other: _tuples(one) == _tuples(other),
    "sym_or": lambda *conditions: any(conditions),
}


def _tuples(value: Any) -> Any:
    """Lists and tuples of the same sizes are equal."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _unchanged(function: Any) -> Any:
    return function


def _not_disabled(function: Any = None, *args: object, **kwargs: object) -> Any:
    """`torch._dynamo.disable` where nothing is compiled."""
    return _unchanged if function is None else function


def _trim_transformers() -> None:
    """What its `__init__` is to find is replaced in a module of it that is imported before."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    version = importlib.metadata.version("transformers")
    package = importlib.util.module_from_spec(spec)
    package.__dict__["__version__"] = version
    sys.modules["transformers"] = package
    try:
        names = importlib.import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]
    utils = sys.modules["transformers.utils"]
    for module in (names, utils):  # tensors that are spread over processes, and all they import
        if "is_torch_distributed_available" in module.__dict__:
            module.__dict__["is_torch_distributed_available"] = lambda: False
    models = Path(spec.origin).parent / "models"
    define: Callable[..., Structure] = names.define_import_structure
    known: list[Structure] = []

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        path = Path(module_path)
        if (path.parent if path.suffix else path) != models:
            return define(module_path, prefix=prefix)
        if not known:
            known.append(_structure(models, version, define))
        before = f"{prefix}." if prefix else ""
        return {
            backends: {f"{before}{module}": set(found) for module, found in modules.items()}
            for backends, modules in known[0].items()
        }

    names.define_import_structure = define_import_structure  # type: ignore[attr-defined]


class _LatePattern:
    """A regular expression that is compiled when it is used."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        compiled = re.compile(*self._arguments)
        for each in ("search", "groupindex"):
            setattr(self, each, getattr(compiled, each))
        return getattr(compiled, name)

    def __deepcopy__(self, memo: object) -> _LatePattern:
        return self


class _LateExpressions(ModuleType):
    """Stands in for `re` in a module that compiles many, and uses few."""

    def __init__(self) -> None:
        super().__init__("re")
        self.compile = _LatePattern

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


def trim_conversions() -> None:
    """transformers has a thousand patterns for the tensors' names of all families, and compiles
    them all for one of them. After it is imported."""
    module = sys.modules.get("transformers.core_model_loading")
    if os.environ.get(WHOLE):
        return
    if module is not None and module.__dict__.get("re") is re:
        module.__dict__["re"] = _LateExpressions()


class _StoredStructure(msgspec.Struct):
    """of: what it was made of. modules: backends that are needed, module → the names in it."""

    of: str
    modules: list[tuple[list[str], dict[str, list[str]]]]


def _structure(models: Path, version: str, define: Callable[..., Structure]) -> Structure:
    """Which names are in which module of all models, which takes transformers the reading of
    thousands of files. Kept in a file of this user's own."""
    of = _fingerprint(models, version)
    folder = caches.private_folder(os.environ, "transformers")
    stored = folder / "names.json" if folder else None
    if stored is not None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = msgspec.json.decode(stored.read_bytes(), type=_StoredStructure)
            if found.of == of:
                return {
                    frozenset(backends): {name: set(names) for name, names in modules.items()}
                    for backends, modules in found.modules
                }
    made = define(str(models))
    if stored is not None:
        modules = [
            (sorted(backends), {name: sorted(names) for name, names in each.items()})
            for backends, each in made.items()
        ]
        with contextlib.suppress(OSError):
            _write(stored, msgspec.json.encode(_StoredStructure(of, modules)))
    return made


def _fingerprint(models: Path, version: str) -> str:
    """Another one after an update, and where a file of a model was added or replaced."""
    digest = hashlib.sha256(f"{version} {models} {models.stat().st_mtime_ns}".encode())
    with os.scandir(models) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            digest.update(f"{entry.name} {entry.stat().st_mtime_ns} ".encode())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it. Raises: OSError"""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
