"""The routes over HTTP, against a real server and a real bundle."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

import httpx
import numpy as np
import pytest

from engine.components import ScoreRequest
from serving.codec import ItemOut
from serving.docs import EXAMPLE_PATH

ITEMS = [str(n) for n in range(30)]


def rank(server: Any, **body: Any) -> dict[str, Any]:
    response = server.client.post("/v1/rank", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def recommend(server: Any, **body: Any) -> dict[str, Any]:
    response = server.client.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def order(answer: dict[str, Any]) -> list[str]:
    return [item["id"] for item in answer["items"]]


# -------------------------------------------------------------------------------------------------- answers
def test_a_ranking_says_what_it_is_made_of(server: Any) -> None:
    answer = rank(server, user="u1", items=ITEMS)
    assert set(answer) == {"request_id", "model", "items", "degraded", "stages", "took_ms"}
    assert answer["model"]["name"] == "tiny"
    assert re.fullmatch(r"[0-9a-f]{12}", answer["model"]["version"])
    assert answer["degraded"] == []
    assert set(answer["stages"]) == {"state", "rank"}
    assert sorted(order(answer)) == sorted(ITEMS)
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert [item["position"] for item in answer["items"]] == list(range(1, 31))
    assert {item["propensity"] for item in answer["items"]} == {1.0}


def test_scores_over_http_are_the_models_own(server: Any) -> None:
    bundle = server.service.pipeline.served.bundle
    state = server.service.store.get("u2")
    assert state.history, "the bundle's users are in the store"
    answer = rank(server, user="u2", items=ITEMS)
    request = ScoreRequest({**state.features, "user_id": "u2"}, {"item_id": state.history}, ITEMS)
    model = bundle.model(server.service.plugins).eval()
    logits = model(bundle.encoder.encode_request(request, bundle.catalogue))["liked"].detach().numpy()
    expected = dict(zip(ITEMS, bundle.calibration["liked"].apply(logits), strict=True))
    for item in answer["items"]:
        assert item["score"] == pytest.approx(expected[item["id"]], abs=1e-6)


def test_a_history_in_the_request_stands_for_the_users(server: Any) -> None:
    stored = rank(server, user="u3", items=ITEMS)
    history = server.service.store.get("u3").history
    assert rank(server, user="u3", history=history, items=ITEMS)["items"] == stored["items"]
    assert rank(server, user="u3", history=["1", "4", "7"], items=ITEMS)["items"] != stored["items"]
    assert rank(server, history=["1"], items=["2"])["degraded"] == []


def test_integers_and_their_text_are_one_id(server: Any) -> None:
    assert rank(server, user="u1", items=[1, 2, 3])["items"] == rank(server, user="u1", items=["1", "2", "3"])["items"]


def test_values_of_a_request_win_over_the_catalogues_in_both_forms(server: Any) -> None:
    plain = rank(server, user="u1", items=["1", "2"])
    columns = rank(server, user="u1", items=["1", "2"], item_features={"year": [None, 2050], "genres": [None, "war"]})
    objects = rank(server, user="u1", items=["1", {"id": "2", "features": {"year": 2050, "genres": "war"}}])
    assert columns["items"] == objects["items"]
    by_id = [{i["id"]: i["score"] for i in a["items"]} for a in (plain, columns)]
    assert by_id[0]["1"] == by_id[1]["1"]
    assert by_id[0]["2"] != by_id[1]["2"]


def test_items_that_nobody_knows_are_ranked_all_the_same(server: Any) -> None:
    answer = rank(server, user="nobody", items=["1", "never-seen", "用户", "\U0001f98a"])
    assert len(answer["items"]) == 4
    assert answer["degraded"] == []


def test_nothing_to_rank_is_an_empty_answer(server: Any) -> None:
    answer = rank(server, user="u1", items=[])
    assert answer["items"] == []
    assert answer["degraded"] == []


def test_two_thousand_items_are_taken_and_one_more_is_not(server: Any) -> None:
    assert len(rank(server, user="u1", items=list(range(2000)), timeout_ms=20_000)["items"]) == 2000
    response = server.client.post("/v1/rank", json={"items": list(range(2001))})
    assert response.status_code == 422
    assert response.json()["errors"] == [{"pointer": "/items", "detail": "2001 items are more than 2000"}]


def test_recommendations_leave_out_what_was_seen_or_excluded(server: Any) -> None:
    state = server.service.store.get("u4")
    assert state.seen
    answer = recommend(server, user="u4", count=30)
    assert set(answer["stages"]) == {"state", "retrieve", "merge", "filter", "rank", "rerank"}
    assert not set(order(answer)) & set(state.seen)
    assert sorted([*order(answer), *set(state.seen)], key=int) == ITEMS, "all the rest is there"
    top = order(answer)[:3]
    again = recommend(server, user="u4", count=30, exclude=top)
    assert not set(order(again)) & set(top)


def test_a_stranger_gets_recommendations_too(server: Any) -> None:
    assert len(recommend(server, count=5)["items"]) == 5
    assert len(recommend(server, user="nobody-knows-me", count=5)["items"]) == 5


def test_recommended_items_are_ranked_as_the_model_ranks_them(server: Any) -> None:
    answer = recommend(server, user="nobody", count=10)
    ranked = rank(server, user="nobody", items=order(answer))
    assert order(ranked) == order(answer)
    got = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(got, [item["score"] for item in ranked["items"]], atol=1e-6)


# --------------------------------------------------------------------------------------------------- events
def test_a_click_changes_the_history_and_the_next_ranking_at_once(server: Any) -> None:
    user = f"clicker-{uuid.uuid4().hex}"
    before = rank(server, user=user, items=ITEMS)
    for n, item in enumerate(["1", "4", "7", "10"]):
        response = server.click(user, item, f"{user}-{n}", ranking=before["request_id"])
        assert response.status_code == 202
        (receipt,) = response.json()["events"]
        assert receipt["status"] == "accepted"
        assert set(receipt) == {"id", "status", "partition", "offset"}
        kept = server.client.get(f"/v1/users/{user}").json()
        assert kept["history"][0]["item"] == item
        assert kept["history"][0]["title"] == f"Film <{item}> & co"
    after = rank(server, user=user, items=ITEMS)
    assert [i["score"] for i in after["items"]] != [i["score"] for i in before["items"]]
    assert not {"1", "4", "7", "10"} & set(order(recommend(server, user=user, count=30)))


def test_an_event_sent_twice_counts_once(server: Any) -> None:
    user = f"twice-{uuid.uuid4().hex}"
    first = server.click(user, "5", f"{user}-x").json()["events"][0]
    second = server.click(user, "5", f"{user}-x")
    assert first["status"] == "accepted"
    assert second.status_code == 202
    assert second.json()["events"] == [{"id": f"{user}-x", "status": "duplicate"}]
    assert len(server.client.get(f"/v1/users/{user}").json()["history"]) == 1


def test_a_view_is_seen_but_does_not_enter_the_history(server: Any) -> None:
    user = f"viewer-{uuid.uuid4().hex}"
    server.click(user, "5", f"{user}-v", type="view")
    kept = server.client.get(f"/v1/users/{user}").json()
    assert (kept["history"], kept["seen"]) == ([], 1)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_many_events_have_a_receipt_each_and_bad_ones_do_not_stop_the_rest(server: Any, form: str) -> None:
    user = f"batch-{form}-{uuid.uuid4().hex}"

    def event(n: int, **data: Any) -> dict[str, Any]:
        return {
            "id": f"{user}-{n}",
            "source": "t",
            "type": "interaction",
            "data": {"type": "click", "user": user} | data,
        }

    events = [event(1, item="1"), event(2), event(1, item="1"), event(3, item="3")]
    if form == "array":
        body, kind = json.dumps(events), "application/json"
    else:
        lines = [json.dumps(e) for e in events]
        body, kind = "\n".join([*lines[:2], "", "{not json", *lines[2:], ""]), "application/x-ndjson"
    response = server.client.post("/v1/events", content=body, headers={"content-type": kind})
    assert response.status_code == 202
    status = [receipt["status"] for receipt in response.json()["events"]]
    if form == "array":
        assert status == ["accepted", "refused", "duplicate", "accepted"]
    else:
        assert status == ["accepted", "refused", "refused", "duplicate", "accepted"]
    assert "missing required field `item`" in response.json()["events"][1]["error"]
    kept = server.client.get(f"/v1/users/{user}").json()
    assert {visit["item"] for visit in kept["history"]} == {"1", "3"}


def test_events_that_are_all_refused_are_a_422_that_says_why(server: Any) -> None:
    response = server.client.post("/v1/events", json={"id": "x", "source": "t", "type": "nonsense", "data": {}})
    assert response.status_code == 422
    problem = response.json()
    assert problem["detail"].startswith("the event was refused:")
    assert problem["errors"][0]["pointer"] == "/0"
    for empty in ("[]", ""):
        assert server.client.post("/v1/events", content=empty, headers=JSON).status_code in (400, 422)


def test_a_users_features_are_merged_and_used(server: Any) -> None:
    user = f"features-{uuid.uuid4().hex}"
    body = {"id": user, "source": "t", "type": "user", "data": {"user": user, "features": {"city": "Köln", "n": 3}}}
    assert server.client.post("/v1/events", json=body).status_code == 202
    assert server.client.get(f"/v1/users/{user}").json()["features"] == {"city": "Köln", "n": 3}


# --------------------------------------------------------------------------------------------------- reasons
def test_an_answer_is_explained_by_history_sources_and_rules(server: Any) -> None:
    answer = recommend(server, user="u5", count=8)
    reasons = server.client.get(f"/v1/explain/{answer['request_id']}", params={"history": 1000}).json()
    assert [r["item"] for r in reasons["items"]] == order(answer)
    assert [r["score"] for r in reasons["items"]] == [i["score"] for i in answer["items"]]
    assert reasons["model"] == answer["model"]
    assert reasons["explained_by"] == answer["model"]["version"]
    history = server.service.store.get("u5").history[:10]  # the feature's max_length
    for reason in reasons["items"]:
        assert reason["title"] == f"Film <{reason['item']}> & co"
        assert set(reason["sources"]) <= {"retriever", "popular", "recent"}
        assert reason["sources"]
        assert sorted(w["item"] for w in reason["history"]) == sorted(history)
        sizes = [abs(w["weight"]) for w in reason["history"]]
        assert sizes == sorted(sizes, reverse=True)


def test_the_weights_are_those_of_the_interest_model(server: Any) -> None:
    answer = rank(server, user="u6", items=["3", "4"])
    reasons = server.client.get(f"/v1/explain/{answer['request_id']}", params={"history": 1000}).json()
    bundle = server.service.pipeline.served.bundle
    state = server.service.store.get("u6")
    first = order(answer)[0]
    request = ScoreRequest({**state.features, "user_id": "u6"}, {"item_id": state.history}, [first])
    batch = bundle.encoder.encode_request(request, bundle.catalogue)
    weights = bundle.model(server.service.plugins).eval().explain(batch)["history"].values().flatten().tolist()
    got = sorted(w["weight"] for w in reasons["items"][0]["history"])
    assert got == pytest.approx(sorted(weights), abs=1e-5)


def test_an_answer_of_long_ago_cannot_be_explained(server: Any) -> None:
    response = server.client.get("/v1/explain/never-was")
    assert response.status_code == 404
    assert "no answer of that request id" in response.json()["detail"]


# ---------------------------------------------------------------------------------------------------- people
def test_a_deleted_user_is_gone_from_state_log_and_explanations(server: Any) -> None:
    user = f"leaver/{uuid.uuid4().hex} ü"
    for n in range(3):
        server.click(user, str(n), f"{user}-{n}")
    answer = rank(server, user=user, items=["1", "2"])
    quoted = httpx.URL("/v1/users/").join(f"/v1/users/{user.replace(' ', '%20')}")
    assert server.client.get(quoted).status_code == 200
    assert server.service.rankings.flush()
    response = server.client.delete(quoted)
    assert response.json() == {"user": user, "state": True, "events": 4}, "three clicks and a ranking"
    assert server.client.get(quoted).status_code == 404
    assert server.client.get(f"/v1/explain/{answer['request_id']}").status_code == 404
    assert user not in {record.key for record in server.service.log.read({0: 0}, limit=100_000)}
    assert server.client.delete(quoted).json() == {"user": user, "state": False, "events": 0}


def test_a_deleted_user_is_gone_from_the_page_too(server: Any) -> None:
    headers = {"sec-fetch-site": "same-origin", "hx-request": "true"}
    for user in ("page-gone", "page-stays"):
        data = {"user": user, "item": "5"}
        assert server.client.post("/playground/events", data=data, headers=headers).status_code == 200
    server.client.delete("/v1/users/page-gone")
    assert "in the log at" not in server.client.get("/?user=page-gone").text
    assert "in the log at" in server.client.get("/?user=page-stays").text


def test_users_are_listed_by_prefix(server: Any) -> None:
    assert server.client.get("/v1/users", params={"limit": 3, "prefix": "u1"}).json() == {"users": ["u1", "u10", "u11"]}
    assert server.client.get("/v1/users", params={"limit": 0}).status_code == 422


def test_an_item_has_its_title_and_attributes(server: Any) -> None:
    item = server.client.get("/v1/items/4").json()
    assert (item["id"], item["title"]) == ("4", "Film <4> & co")
    assert item["attributes"]["genres"] == "comedy|all"
    assert server.client.get("/v1/items/400").status_code == 404


# ------------------------------------------------------------------------------------------------- the server
def test_health_is_a_real_scoring(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.client.get("/health/live").json() == {"status": "live"}
    ready = server.client.get("/health/ready").json()
    assert ready["status"] == "ready"
    assert ready["took_ms"] > 0

    def broken() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.service.scorer, "health", broken)
    response = server.client.get("/health/ready")
    assert response.status_code == 503
    assert "secret detail" not in response.text
    assert server.client.get("/health/live").status_code == 200


def test_metrics_are_in_base_units_and_name_nobody(server: Any) -> None:
    rank(server, user="metric-user", items=["metric-item", "1"])
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    assert re.search(
        r'plexrank_request_duration_seconds_count{method="POST",route="/v1/rank",status="200"} [1-9]', text
    )
    assert re.search(r'plexrank_stage_duration_seconds_count{stage="rank"} [1-9]', text)
    assert 'plexrank_model_info{model="tiny"' in text
    assert "metric-user" not in text
    assert "metric-item" not in text
    for name in re.findall(r"^# TYPE (\S+)", text, flags=re.MULTILINE):
        assert name.startswith("plexrank_")
        assert re.search(r"_(seconds|total|info|ratio|created|items|bytes|rows|spooled)$", name), name


def test_plugins_are_listed_with_those_that_work_here(server: Any) -> None:
    rows = {(p["kind"], p["name"]): p for p in server.client.get("/v1/plugins").json()["plugins"]}
    assert rows["interests", "din"]["used"]
    assert rows["state_stores", "sqlite"]["used"]
    assert not rows["state_stores", "redis"]["used"]
    assert rows["scorers", "inproc"]["distribution"] == "plexrank"


def test_a_request_id_is_echoed_made_or_taken_from_the_trace(server: Any) -> None:
    body = {"items": ["1"]}
    given = server.client.post("/v1/rank", json=body, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "mine-1"
    trace = "0af7651916cd43dd8448eb211c80319c"
    traced = server.client.post("/v1/rank", json=body, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    assert traced.json()["request_id"].startswith(trace)
    evil = server.client.post("/v1/rank", json=body, headers={"x-request-id": 'x"><script>' + "y" * 300})
    assert re.fullmatch(r"[0-9a-f]{32}", evil.json()["request_id"])


def test_every_answer_has_safe_headers(server: Any) -> None:
    for path in ("/health/live", "/nothing-here", "/docs", "/openapi.json", "/"):
        headers = server.client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'"), path
        assert headers["x-content-type-options"] == "nosniff"
        assert "x-request-id" in headers


def test_the_documentation_needs_nothing_from_elsewhere(server: Any) -> None:
    page = server.client.get("/docs").text
    assert "/v1/rank" in page
    assert "curl -s http://127.0.0.1" in page
    assert 'id="problem-too-large"' in page
    assert not re.findall(r'(?:src|href)="https?://', page)
    assert "<script" not in page
    assert "<style" not in page
    assert server.client.get("/docs.css").headers["content-type"].startswith("text/css")


def test_the_curl_lines_of_the_documentation_work(server: Any) -> None:
    document = server.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" in content and not path.startswith("/v1/models"):
                response = server.client.request(method, operation.get(EXAMPLE_PATH, path), json=content["example"])
                assert response.status_code in (200, 202), (path, response.text)


def test_the_published_schema_is_the_one_that_decodes(server: Any) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    assert {"RankIn", "RecommendIn", "RankOut", "Problem", "Envelope", "InteractionData"} <= set(schemas)
    assert schemas["RankIn"]["required"] == ["items"]
    assert schemas["RankIn"]["additionalProperties"] is False
    assert set(schemas["ItemOut"]["properties"]) == set(ItemOut.__struct_fields__)
    assert "HTTPValidationError" not in json.dumps(schemas)


JSON = {"content-type": "application/json"}
