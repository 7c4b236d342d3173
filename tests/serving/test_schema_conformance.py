"""Schemathesis: requests made from the published schema, valid and broken, meet no 500 and no undocumented answer.

A valid body may still be refused (422): which features there are is the model's business, not the schema's.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

PATHS = [
    "POST /v1/rank",
    "POST /v1/recommend",
    "POST /v1/events",
    "GET /v1/explain/{request_id}",
    "GET /v1/users",
    "GET /v1/users/{user}",
    "DELETE /v1/users/{user}",
    "GET /v1/items/{item}",
    "GET /v1/models",
    "POST /v1/models:load",
    "POST /v1/models/{version}:promote",
    "POST /v1/models:rollback",
    "POST /v1/models:pin",
    "POST /v1/models:unpin",
    "GET /v1/plugins",
    "GET /health/live",
    "GET /health/ready",
    "GET /metrics",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /v2/models/{model}",
    "GET /v2/models/{model}/ready",
    "GET /v2/models/{model}/versions/{version}",
    "GET /v2/models/{model}/versions/{version}/ready",
    "POST /v2/models/{model}/infer",
    "POST /v2/models/{model}/versions/{version}/infer",
]


@pytest.fixture(scope="module")
def api(server: Any) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def test_every_published_operation_is_tried(api: Any) -> None:
    published = [result.ok().label for result in api.get_all_operations()]
    assert sorted(published) == sorted(PATHS)


NOTHING_TO_BREAK = {
    "GET /v1/users/{user}",
    "DELETE /v1/users/{user}",
    "GET /v1/items/{item}",
    "GET /v1/models",
    "GET /v1/plugins",
    "GET /health/live",
    "GET /health/ready",
    "GET /metrics",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /v2/models/{model}/versions/{version}",
    "GET /v2/models/{model}/versions/{version}/ready",
}
"""They take nothing, or any text: no request breaks their schema."""


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", PATHS)
def test_every_answer_is_one_that_is_published(api: Any, label: str, mode: GenerationMode) -> None:
    operation = next(result.ok() for result in api.get_all_operations() if result.ok().label == label)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    if mode is GenerationMode.NEGATIVE and label in NOTHING_TO_BREAK:
        with pytest.raises(Unsatisfiable):
            check()
    else:
        check()
