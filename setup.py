"""Build umer1; metadata lives in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["umer1", "umer1.*"]),
    package_data={"umer1": ["assets/**/*", "configs/*.yaml", "rl/engines/child_site/*.py"]},
)
