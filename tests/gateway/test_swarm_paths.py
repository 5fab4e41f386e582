"""`/swarm/...`, `/status` and `/metrics` of the gateway of a swarm, over HTTP."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_swarm import SmallSwarm

from plait.gateway import GatewayOptions, hash_api_key
from plait.transport import Ticket

ASK = {"messages": [{"role": "user", "content": "What is plait?"}], "max_tokens": 12, "temperature": 0}
HOME = GatewayOptions(local_names_only=True)


@pytest.fixture(scope="module")
def swarm(site: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallSwarm:
    swarm = site.enter(SmallSwarm(tmp_path_factory.mktemp("rates")))
    site.run(swarm.join("one", range(3)))
    site.run(swarm.join("two", range(3, 6)))
    site.run(swarm.wait_serving("one", "two"))
    return swarm


@pytest.fixture(scope="module")
def http(site: Any, swarm: SmallSwarm) -> Iterator[httpx.Client]:
    origin = site.serve(swarm.gateway.engine, HOME, desk=swarm.gateway)
    with httpx.Client(base_url=origin, timeout=60) as http:
        yield http


def test_status_says_what_each_machine_does(site: Any, http: httpx.Client, swarm: SmallSwarm) -> None:
    before = {machine["name"]: machine for machine in http.get("/swarm/status").json()["machines"]}
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    status = http.get("/swarm/status").json()
    machines = {machine["name"]: machine for machine in status["machines"]}
    tokens = machines["two"]["gateway_tokens_total"] - before["two"]["gateway_tokens_total"]
    assert 0 < tokens <= 12
    assert machines["one"]["gateway_tokens_total"] - before["one"]["gateway_tokens_total"] == tokens
    assert machines["gateway"]["gateway_tokens_total"] == 0
    assert machines["one"]["loading"] is None
    assert (
        status["sessions_by_state"] == {} and status["chains"] == [] and status["replayed_tokens_total"] == 0
    )
    between = (machines["one"]["peer"], machines["two"]["peer"])

    def is_told() -> bool:  # by gossip, some time after it was measured
        links: list[dict[str, Any]] = dict(swarm.gateway.status())["links"]
        return between in {(link["from"], link["to"]) for link in links}

    site.until(is_told)
    few = http.get("/swarm/status", params={"max_links": 1}).json()["links"]
    assert len(few) == len({link["from"] for link in few}) == 3
    assert http.get("/swarm/status", params={"max_links": -1}).status_code == 400
    assert http.get("/status").json()["swarm"] is True


def test_a_chain_is_shown_while_sessions_cross_it(site: Any, http: httpx.Client, swarm: SmallSwarm) -> None:
    seen: list[dict[str, Any]] = []

    def is_running() -> bool:
        status = dict(swarm.gateway.status())
        if status["sessions_by_state"] == {"flowing": 1}:
            seen.append(status)
        return bool(seen)

    body = ASK | {"max_tokens": 900, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body):
        site.until(is_running)
    status = seen[0]
    (running,) = status["chains"]
    assert running["sessions"] == 1
    assert [(hop["name"], hop["first_block"], hop["end_block"]) for hop in running["chain"]] == [
        ("one", 0, 3),
        ("two", 3, 6),
    ]


@pytest.mark.parametrize("route", [{}, {"mode": "exact"}, {"mode": "pinned", "pinned": ["one", "two"]}])
def test_a_chain_can_be_shown_beside_the_front(http: httpx.Client, route: dict[str, Any]) -> None:
    body = {"route": route, "beside_front": True}
    answer = http.post("/swarm/route", json=body)
    assert answer.status_code == 200, answer.text
    routed = answer.json()
    assert routed["front"]["objectives"] == ["step_s", "rate_tokens_per_s"] and routed["front"]["exact"]
    assert len(routed["values"]) == 2 and routed["values"][0] > 0
    (member,) = routed["front"]["members"]
    assert member["chain"] == routed["chain"] and member["values"] == pytest.approx(routed["values"])


def test_metrics_have_the_swarm(http: httpx.Client, swarm: SmallSwarm) -> None:
    text = http.get("/metrics").text
    samples = {
        (sample.name, sample.labels.get("machine") or sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("plait_swarm_")
    }
    assert samples["plait_swarm_machines", "online"] == 3
    assert samples["plait_swarm_missing_blocks", None] == 0
    assert samples["plait_swarm_sent_bytes_total", "one"] > 100
    assert samples["plait_swarm_machine_sent_bytes_total", "one"] > 100
    assert samples["plait_swarm_received_bytes_total", "two"] > 100
    assert samples["plait_swarm_rtt_seconds", "one"] > 0
    assert samples["plait_swarm_failovers_total", None] == 0
    assert "plait_num_requests_running" in text


def test_advice_says_what_each_machine_is_for(http: httpx.Client) -> None:
    advice = http.get("/swarm/advice").json()
    assert "for one user" in advice["sentences"][0]
    whys = {machine["name"]: machine["why"] for machine in advice["machines"]}
    assert whys.keys() == {"one", "two"}
    assert "without it, blocks 0:3 would be served by nobody" in whys["one"]
    assert advice["sets"][0]["step_s"] <= advice["sets"][-1]["step_s"]


def test_only_the_owner_gets_a_ticket_and_sends_machines_away(site: Any, swarm: SmallSwarm) -> None:
    def ask(options: GatewayOptions, key: str | None = None) -> tuple[httpx.Response, httpx.Response]:
        origin = site.serve(swarm.gateway.engine, options, desk=swarm.gateway)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return (
            httpx.get(origin + "/swarm/ticket", headers=headers),
            httpx.post(origin + "/swarm/leave", headers=headers, json={"peer": "nobody"}),
        )

    for answer in ask(GatewayOptions()):  # no key, and anybody may ask
        assert answer.status_code == 401
        assert "--api-key" in answer.json()["error"]["message"]
    keyed = GatewayOptions(api_key_hashes=(hash_api_key("sk-right"),))
    assert [answer.status_code for answer in ask(keyed)] == [401, 401]
    assert [answer.status_code for answer in ask(keyed, "sk-wrong")] == [401, 401]
    for ticket, leave in (ask(keyed, "sk-right"), ask(HOME)):
        parsed = Ticket.parse(ticket.json()["ticket"], unix_now_s=swarm.gateway.node.unix_now())
        assert parsed.peers[0].peer == swarm.gateway.node.peer
        assert leave.status_code == 400 and "nobody" in leave.json()["error"]["message"]
