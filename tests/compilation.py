"""How the tests compile; imports nothing, for conftest.py reads it before jax is imported."""

# Programs that compile fast rather than run fast: three times as fast as with the first flag alone; half of the time
# went into fusions.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true"
)
