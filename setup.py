"""The one thing that pyproject.toml cannot say: what is native is built with Cython."""

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = ("keyfilter", "sources.postgres.pgoutput", "sources.postgres.copytext")

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"headrace.{name}",
                [f"src/headrace/{name.replace('.', '/')}.pyx"],
                extra_compile_args=["-O3"],
            )
            for name in NATIVE
        ],
        compiler_directives={"language_level": 3, "embedsignature": True},
    )
)
