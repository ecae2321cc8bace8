"""Build umer1; metadata lives in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["umer1", "umer1.*"]) + ["umer1_kernels"],
    # The folder is kernels/; this import name leaves `kernels` to Hugging Face's package of that name.
    package_dir={"umer1_kernels": "kernels"},
    package_data={"umer1": ["assets/**/*", "configs/*.yaml", "rl/engines/child_site/*.py"]},
)
