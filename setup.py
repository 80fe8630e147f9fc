"""Maps the two import packages of the distribution; imports no torch, so it installs into an empty environment."""

from setuptools import find_packages, setup

KERNELS = "kernels/torch-ext/psann_kernels"

setup(
    packages=find_packages(include=["psann_fast", "psann_fast.*"]) + ["psann_kernels"],
    package_dir={"psann_kernels": KERNELS},
    package_data={"psann_fast": ["py.typed", "presets/*.yaml"], "psann_kernels": ["py.typed", "metadata.json"]},
)
