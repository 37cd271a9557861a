"""The one thing that pyproject.toml cannot say: what is native is built with Cython."""

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = ("pgoutput", "copytext")

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"headrace.sources.postgres.{name}",
                [f"src/headrace/sources/postgres/{name}.pyx"],
                extra_compile_args=["-O3"],
            )
            for name in NATIVE
        ],
        compiler_directives={"language_level": 3, "embedsignature": True},
    )
)
