"""The one thing that pyproject.toml cannot say: the native decoder is built with Cython."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension(
                "headrace.sources.postgres.pgoutput",
                ["src/headrace/sources/postgres/pgoutput.pyx"],
                extra_compile_args=["-O3"],
            )
        ],
        compiler_directives={"language_level": 3, "embedsignature": True},
    )
)
