"""NetworkPolicies as rules: what the API reference says of each field."""

from typing import Any

import pytest

from orchestration.operations.local_cluster.policies import render_rules, selects


def _pod(name: str, ip: str, namespace: str = "a", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}], **spec},
        "status": {"podIP": ip, "phase": "Running"},
    }


PODS = [_pod("web", "10.0.0.1"), _pod("db", "10.0.0.2"), _pod("other", "10.0.0.3", "b")]
NAMESPACES = [{"metadata": {"name": name, "labels": {"name": name}}} for name in ("a", "b")]


def _rules(**spec: Any) -> list[str]:
    """Return the rules of one policy in namespace a for pod db, without those for established connections."""
    policy = {
        "metadata": {"name": "p", "namespace": "a"},
        "spec": {"podSelector": {"matchLabels": {"app": "db"}}, **spec},
    }
    lines = render_rules([policy], PODS, NAMESPACES).splitlines()
    return [line for line in lines if line.startswith("-A") and "conntrack" not in line]


ALL_TO_DB = "-A NETPOL-IN -d 10.0.0.2 -j DROP"
ALL_FROM_DB = "-A NETPOL-OUT -s 10.0.0.2 -j DROP"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [ALL_TO_DB]),
        ({"policyTypes": ["Egress"]}, [ALL_FROM_DB]),
        ({"egress": [{}]}, [ALL_TO_DB, "-A NETPOL-OUT -s 10.0.0.2 -j RETURN", ALL_FROM_DB]),
        ({"ingress": [{}]}, ["-A NETPOL-IN -d 10.0.0.2 -j RETURN", ALL_TO_DB]),
        (
            {"ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 5432}]}]},
            [
                "-A NETPOL-IN -d 10.0.0.2 -s 10.0.0.1 -p tcp --dport 5432 -j RETURN",
                "-A NETPOL-IN -d 10.0.0.2 -s 10.0.0.2 -p tcp --dport 5432 -j RETURN",
                ALL_TO_DB,
            ],
        ),
        (
            {"ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"name": "b"}}}]}]},
            ["-A NETPOL-IN -d 10.0.0.2 -s 10.0.0.3 -j RETURN", ALL_TO_DB],
        ),
        (
            {"ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}]}]},
            ["-A NETPOL-IN -d 10.0.0.2 -s 10.0.0.1 -j RETURN", ALL_TO_DB],
        ),
        (
            {"ingress": [{"from": [{"ipBlock": {"cidr": "10.1.0.0/24", "except": ["10.1.0.128/25"]}}]}]},
            ["-A NETPOL-IN -d 10.0.0.2 -s 10.1.0.0/25 -j RETURN", ALL_TO_DB],
        ),
        (
            {"ingress": [{"ports": [{"port": "http"}, {"port": "https"}, {"protocol": "UDP", "port": "http"}]}]},
            ["-A NETPOL-IN -d 10.0.0.2 -p tcp --dport 8080 -j RETURN", ALL_TO_DB],
        ),
        (
            {"ingress": [{"ports": [{"port": 80, "endPort": 90}, {"protocol": "UDP"}]}]},
            [
                "-A NETPOL-IN -d 10.0.0.2 -p tcp --dport 80:90 -j RETURN",
                "-A NETPOL-IN -d 10.0.0.2 -p udp -j RETURN",
                ALL_TO_DB,
            ],
        ),
        (
            {
                "policyTypes": ["Egress"],
                "egress": [
                    {"to": [{"namespaceSelector": {"matchLabels": {"name": "b"}}}], "ports": [{"port": "http"}]}
                ],
            },
            ["-A NETPOL-OUT -s 10.0.0.2 -d 10.0.0.3 -p tcp --dport 8080 -j RETURN", ALL_FROM_DB],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:60],
)
def test_policy_becomes_rules(spec: dict[str, Any], expected: list[str]) -> None:
    assert sorted(_rules(**spec)) == sorted(expected)


def test_policies_add_up_before_one_drop_rule() -> None:
    def allowing(name: str, port: int) -> dict[str, Any]:
        spec = {"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]}
        return {"metadata": {"name": name, "namespace": "b"}, "spec": spec}

    lines = render_rules([allowing("one", 1), allowing("two", 2)], PODS, NAMESPACES).splitlines()
    assert [line for line in lines if "10.0.0.3" in line] == [
        "-A NETPOL-IN -d 10.0.0.3 -p tcp --dport 1 -j RETURN",
        "-A NETPOL-IN -d 10.0.0.3 -p tcp --dport 2 -j RETURN",
        "-A NETPOL-IN -d 10.0.0.3 -j DROP",
    ]


def test_ended_pods_and_pods_on_the_node_network_have_no_rules() -> None:
    deny = {"metadata": {"name": "p", "namespace": "a"}, "spec": {"podSelector": {}}}
    ended = _pod("done", "10.0.0.9") | {"status": {"podIP": "10.0.0.9", "phase": "Succeeded"}}
    text = render_rules([deny], [_pod("host", "10.250.0.1", hostNetwork=True), ended], NAMESPACES)
    assert "DROP" not in text


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
    ],
)
def test_label_selector_matches_labels(selector: dict[str, Any], expected: bool) -> None:
    assert selects(selector, {"a": "1"}) is expected
