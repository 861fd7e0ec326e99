"""The backends of the operations: their names, the default for each platform, and whether one can run here.

JAX is imported only where a device is looked at, so that command lines can read the names without it.
"""

BACKENDS = ("reference", "native", "triton", "jax_triton", "tpu")
_DEFAULT_OF_PLATFORM = {"gpu": "triton", "cuda": "triton", "tpu": "tpu"}
_PLATFORMS_OF_BACKEND = {"native": ("cpu",), "triton": ("gpu", "cuda"), "jax_triton": ("gpu", "cuda"), "tpu": ("tpu",)}


def resolve_backend(backend: str | None, platform: str | None = None) -> str:
    """Returns the backend by this name, or the default of the platform if it is None.

    The defaults are "triton" on NVIDIA GPUs, "tpu" on TPUs, "native" on CPUs if it can be built there, and else "reference".

    Args:
      backend: a name, or None to choose.
      platform: platform of the device for the backend; None: that of JAX's default device.

    Raises:
      ValueError: if the name is unknown.
    """
    if backend is None:
        platform = platform or _platform()
        if platform == "cpu" and _why_not_native() is None:
            return "native"
        return _DEFAULT_OF_PLATFORM.get(platform, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}, or None to choose")
    return backend


def compiles_for_cuda(backend: str, platform: str | None = None) -> bool:
    """Returns whether programs with this backend are compiled for an NVIDIA GPU, or interpreted as if they were.

    `platform` is as in `resolve_backend`.
    """
    return backend in ("triton", "jax_triton") or (platform or _platform()) in ("gpu", "cuda")


def check_runs_here(backend: str, *, interpret: bool, platform: str | None = None) -> None:
    """Checks that a backend can run on a device.

    Args:
      backend: the name of the backend.
      interpret: whether its kernels run in Pallas' interpreter; the kernels of some backends can, on any device.
      platform: platform of the device that holds the weights; None: that of JAX's default device.

    Raises:
      ValueError: if it cannot; the message names the backend, the platform, and what to use instead.
    """
    platforms = _PLATFORMS_OF_BACKEND.get(backend, ())
    where = "default device is" if platform is None else "weights are on"
    platform = platform or _platform()
    interpretable = backend in ("triton", "tpu")
    if platforms and platform not in platforms and not (interpret and interpretable):
        device = {"tpu": "a TPU", "native": "a CPU"}.get(backend, "an NVIDIA GPU")
        raise ValueError(
            f"backend {backend!r} needs {device}, but the {where} a {platform}: use 'reference'"
            + (", or interpret the kernels (slow)" if interpretable else "")
        )
    if backend == "native" and (reason := _why_not_native()) is not None:
        raise ValueError(f"backend 'native' cannot run here: {reason}; or use 'reference'")


def _why_not_native() -> str | None:
    from pallas_kernels.native import library

    return library.why_not()


def _platform() -> str:
    import jax

    return jax.default_backend()
