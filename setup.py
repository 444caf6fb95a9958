"""Everything static is in pyproject.toml. This adds one thing: FASTLORA_BUILD_CUDA=1 compiles csrc/ into the wheel.

    FASTLORA_BUILD_CUDA=1 pip install --no-build-isolation .

(--no-build-isolation, because csrc/ is compiled against the torch that is installed.) Without it the package is pure
Python, and the ops are compiled at first use.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def load(name):
    """A module of fastlora without fastlora/__init__.py, whose imports need not be installed while building."""
    package = sys.modules.setdefault("fastlora", types.ModuleType("fastlora"))
    package.__path__ = [str(HERE / "fastlora")]
    return importlib.import_module(f"fastlora.{name}")


BUILD_CUDA = load("runtime.env").build_cuda()


class BuildPy(build_py):
    def run(self):
        # An editable install runs from the checkout, so the object belongs there.
        package = HERE / "fastlora" if self.editable_mode else Path(self.build_lib) / "fastlora"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # an earlier build's files would go into this wheel too
        super().run()
        if not BUILD_CUDA:
            return
        print(f"compiling csrc/ into {package}/_prebuilt", flush=True)
        load("runtime.build").prebuild(package)


class BdistWheel(bdist_wheel):
    """A wheel with compiled ops is for one platform and every Python: the ops use torch's stable ABI only."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", platform) if BUILD_CUDA else super().get_tag()


class PlatformDistribution(Distribution):
    """Tells setuptools that there is compiled code, though no extension module of its kind."""

    def has_ext_modules(self):
        return BUILD_CUDA or super().has_ext_modules()


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=PlatformDistribution)
