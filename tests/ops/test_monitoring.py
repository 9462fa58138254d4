"""Alerts fire, and nothing in ops/monitoring asks for a metric that nobody exports."""

import json
import re
import subprocess
from pathlib import Path

import httpx

from tests.ops.conftest import Tool, store
from tests.serving import RunningServer, execute

PROJECT = Path(__file__).parents[2]
MONITORING = PROJECT / "ops" / "monitoring"
ALERTS = (MONITORING / "alerts.yml").read_text()
ALERTS_TEST = Path(__file__).with_name("alerts_test.yml")
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())

TOOLS = ("audit", "scrub", "backup", "drill")
OF_OTHERS = {"up", "probe_ssl_earliest_cert_expiry", "probe_success"}
"""Metrics of Prometheus itself and of blackbox_exporter."""


def names_in(text: str) -> set[str]:
    """Metrics of Coffer that PromQL asks for, as they are declared."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\bcoffer_[a-z_]+", text)}


def expressions() -> list[str]:
    """All PromQL of the rules and the dashboard."""
    rules = re.findall(r"^        expr: (?:\|\n((?: {10}.*\n)+)|(.*)\n)", ALERTS, re.MULTILINE)
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [block or line for block, line in rules] + panels


def declared(text: str) -> set[str]:
    """The metrics that an exposition declares, each with samples or not."""
    return set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))


def promtool(*arguments: str | Path) -> str:
    return run("promtool", *arguments)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_alert_fires_and_keeps_quiet_as_it_should() -> None:
    promtool("check", "rules", MONITORING / "alerts.yml")
    promtool("test", "rules", ALERTS_TEST)


def test_every_alert_is_tried_both_ways() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", ALERTS))
    tried = ALERTS_TEST.read_text()
    fired = set(re.findall(r"alertname: (\w+)(?:\n +|, )exp_alerts:", tried))
    quiet = set(re.findall(r"alertname: (\w+)(?!\w)(?!(?:\n +|, )exp_alerts:)", tried))
    assert alerts == fired == quiet


def test_the_examples_are_what_prometheus_takes() -> None:
    assert "SUCCESS" in promtool("check", "config", MONITORING / "prometheus.yml")
    alertmanager = MONITORING / "alertmanager.yml"
    assert "SUCCESS" in run("amtool", "check-config", alertmanager)
    alerts = set(re.findall(r"- alert: (\w+)", ALERTS))
    assert set(re.findall(r"\bCoffer\w+", alertmanager.read_text())) <= alerts


def test_every_alert_goes_to_whom_its_severity_says() -> None:
    for name, severity in re.findall(r"- alert: (\w+)\n(?:.*\n)*?        labels: \{severity: (\w+)\}", ALERTS):
        receiver = {"page": "phone", "ticket": "mail"}[severity]
        asked = ("--config.file", MONITORING / "alertmanager.yml", f"--verify.receivers={receiver}")
        run("amtool", "config", "routes", "test", *asked, f"alertname={name}", f"severity={severity}")


def test_every_alert_leads_to_a_page() -> None:
    rules = re.findall(r"- alert: (\w+)\n(.*?)(?=\n      - |\n\n|\Z)", ALERTS, re.DOTALL)
    assert len(rules) == ALERTS.count("- alert:")
    for name, rule in rules:
        (page,) = re.findall(r"runbook: (\S+)", rule)
        assert f"`{name}`" in (PROJECT / page).read_text(), f"{page} does not say what {name} is"
        assert re.search(r"severity: (page|ticket)\b", rule), name


def test_rules_and_dashboard_ask_for_what_is_exported(server: RunningServer, tool: Tool, tmp_path: Path) -> None:
    store(server, "ada", 1)
    execute(server.database_url, "insert into preview_figures values ('image', 'ready', 1, 1, 0.5)")
    exported = declared(httpx.get(f"{server.url}/metrics").text)
    exported |= declared((PROJECT / "ops" / "nginx" / "coffer_edge.lua").read_text().replace('"', "\n").replace("\\n", "\n"))
    for name in ("audit", "scrub"):
        file = tmp_path / f"{name}.prom"
        tool(name, "--metrics-file", str(file))
        of_tool = declared(file.read_text())
        exported |= of_tool
        # What the frame gives to one tool it gives to all.
        exported |= {f"coffer_{other}_{each.removeprefix(f'coffer_{name}_')}" for each in of_tool for other in TOOLS}
    asked = set[str]().union(*(names_in(each) for each in expressions()))
    assert len(asked) > 30 and asked <= exported, sorted(asked - exported)
    for expression in expressions():
        words = set(re.findall(r"(?<![\w\"/.{$])[a-z_]{2,}(?=\{)", re.sub(r"\"[^\"]*\"", '""', expression)))
        assert {word for word in words if not word.startswith("coffer_")} <= OF_OTHERS, expression
    recorded = set(re.findall(r"record: (\S+)", ALERTS))
    assert set(re.findall(r"\bcoffer:\w+", " ".join(expressions()))) <= recorded


def test_rules_name_routes_as_they_are_counted(server: RunningServer) -> None:
    store(server, "ada", 1)
    with server.client("ada") as client:
        client.get("/api/files").raise_for_status()
    text = httpx.get(f"{server.url}/metrics").text
    for labels in set(re.findall(r'route="(/[^"]*)", method="(\w+)"', " ".join(expressions()))):
        assert f'coffer_http_requests_total{{method="{labels[1]}",route="{labels[0]}",' in text, labels
