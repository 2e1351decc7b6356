"""How the tests' programs are compiled for CPUs: they are many and tiny, and each runs a few times."""

FLAGS = (
    "--xla_backend_optimization_level=0",
    # Each fusion through MLIR takes three quarters of the time of compiling.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # A program is else cut into 32 modules, each copied, for threads that other tests keep busy.
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags(devices: int, *, level: int = 0) -> str:
    """``XLA_FLAGS`` of a process with so many devices; ``level`` 1 is for programs that run for long."""
    chosen = [flag.replace("level=0", f"level={level}") for flag in FLAGS]
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *chosen])
