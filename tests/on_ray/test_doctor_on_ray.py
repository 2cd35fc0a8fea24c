"""One real run: every package is imported, every engine reads a picture, Ray's node answers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from raysys.config import OcrConfig
from raysys.doctor.judge import ALL
from raysys.regions.models import find_models

pytestmark = [pytest.mark.ray, pytest.mark.long]  # a minute of both cores: it opens every engine


def test_the_page_of_this_machine(run_cli: Callable[..., tuple[int, str, str]], ray_cluster: None) -> None:
    status, page, err = run_cli("doctor")
    assert (status, err) == (0, ""), page
    assert re.search(r"^engines +onnx \(default\) +reads a picture in [\d.]+ s", page, re.MULTILINE), page
    for name, sha256 in find_models(OcrConfig()).sha256().items():
        assert re.search(rf"^ +{name} +{sha256[:12]}  \S+\.onnx$", page, re.MULTILINE), page
    assert re.search(r"^ +\d+\.\d+\.\d+\.\d+ +2/2 +\S+ .* the driver's$", page, re.MULTILINE), page
    assert [line.split()[:2] for line in page.splitlines()[-len(ALL) :]] == [[verb, "ready"] for verb in ALL]
