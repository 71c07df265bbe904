"""A W&B server for tests: enough of its API that the real `wandb sweep`, `wandb agent` and client run against it.

Written from what the client (0.31) sends. It listens on 127.0.0.1 only and keeps everything in memory, for tests to
look at: `sweeps`, `runs` (config, history, summary, state, ...), `views`, and the `operations` that it was asked for.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml
from standin_wandb_api import PublicApi
from standin_wandb_artifacts import ENTITY, Artifacts, Refused

VIEWER = {
    "id": "u1",
    "entity": ENTITY,
    "username": ENTITY,
    "email": "t@example.com",
    "flags": "{}",
    "teams": {"edges": []},
}


@dataclass
class Sweep:
    """A sweep as `wandb sweep` made it, and what is still to be handed out."""

    name: str
    project: str
    text: str
    config: dict[str, Any]
    suggestions: Any  # iterator over points
    requeued: list[str] = field(default_factory=list)  # ids of preempted runs


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    project: str
    sweep: str | None = None
    point: dict[str, Any] = field(default_factory=dict)  # what the sweep gave it
    config: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)  # group, jobType, tags, displayName
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)  # severity, title, text
    state: str = "pending"
    exit_code: int | None = None
    preempting: bool = False
    stop: bool = False  # answer the next rows with "stopped"
    agents: list[str] = field(default_factory=list)  # one per start
    exit_codes: list[int] = field(default_factory=list)  # one per end


class StandInServer(Artifacts, PublicApi):
    """The server, in a thread; a context manager.

    Attributes:
        stop_when: called with a run whenever it has sent rows; True answers it with "stopped", as early termination
            does.
        environment: the variables with which W&B's programs talk to this server.
    """

    def __init__(self):
        super().__init__()
        self.sweeps: dict[str, Sweep] = {}
        self.runs: dict[str, Run] = {}
        self.agents: dict[str, str] = {}  # id -> sweep
        self.views: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.stop_when = lambda run: False
        self.lock = threading.RLock()
        self.random = random.Random(0)

    def __enter__(self) -> StandInServer:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with owner.lock:
                    if self.path == "/graphql":
                        answer = owner.graphql(json.loads(body))
                    elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                        answer = owner.file_stream(owner.runs[match[1]], json.loads(body))
                    else:
                        answer = {}
                self.reply(json.dumps(answer).encode())

            def do_PUT(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with owner.lock:
                    owner.contents[unquote(self.path)] = body
                self.reply(b"")

            def do_GET(self):
                self.reply(owner.contents.get(unquote(self.path), b"{}"))

            def reply(self, body: bytes):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    def of_sweep(self, sweep: str) -> list[Run]:
        with self.lock:
            return [run for run in self.runs.values() if run.sweep == sweep]

    # ---- GraphQL

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
        name = found[1] if found else "?"
        self.operations.append(name)
        handler = getattr(self, f"on_{name}", None)
        if handler is None:
            self.unknown.append(name)
            return {"errors": [{"message": f"the stand-in does not know {name}"}]}
        try:
            return {"data": handler(request.get("variables") or {})}
        except Refused as error:
            return {"errors": [{"message": str(error)}]}

    def on_Viewer(self, _):
        return {"viewer": VIEWER}

    def on_ServerFeaturesQuery(self, _):
        return {"serverInfo": {"features": []}}

    def on_OrganizationCoreWeaveOrganizationID(self, _):
        return {"entity": {"organization": None}}

    def on_UpsertSweep(self, v):
        config = yaml.safe_load(v["config"])
        sweep = Sweep(f"sweep{len(self.sweeps)}", v["projectName"], v["config"], config, self.points(config))
        self.sweeps[sweep.name] = sweep
        project = {"id": "p1", "name": sweep.project, "entity": {"id": "e1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": sweep.name, "project": project}, "configValidationWarnings": []}}

    def points(self, config: dict[str, Any]):
        """What a sweep hands out: the grid, or draws without end."""
        parameters = config["parameters"]
        listed = {k: p.get("values", [p.get("value")]) for k, p in parameters.items()}
        if config["method"] == "grid":
            yield from (dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values()))
            return
        while True:
            yield {k: self.draw(p) if "min" in p else self.random.choice(listed[k]) for k, p in parameters.items()}

    def draw(self, parameter: dict[str, Any]) -> float:
        low, high = parameter["min"], parameter["max"]
        if parameter.get("distribution", "").startswith("log"):
            return math.exp(self.random.uniform(math.log(low), math.log(high)))
        return self.random.uniform(low, high)

    def on_SweepWithRuns(self, v):
        sweep = self.sweeps[v["sweep"]]
        node = {
            "id": f"id-{sweep.name}", "name": sweep.name, "method": sweep.config["method"], "state": "RUNNING",
            "description": None, "config": sweep.text, "createdAt": None, "heartbeatAt": None, "updatedAt": None,
            "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None,
            "runs": {"edges": []},
        }  # fmt: skip
        return {"project": {"sweep": node}}

    def on_CreateAgent(self, v):
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = v["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def on_Heartbeat(self, v):
        agent = v["id"]
        sweep = self.sweeps[self.agents[agent]]
        idle = not json.loads(v["runState"] or "{}")
        for run in self.of_sweep(sweep.name):
            if idle and run.agents[-1:] == [agent] and run.state == "pending":
                run.state = "crashed"  # its process is over, and it never said a word
        commands = [self.command(agent, sweep)] if idle else []
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps([c for c in commands if c])}}

    def command(self, agent: str, sweep: Sweep) -> dict[str, Any] | None:
        """What an idle agent shall do: preempted runs first, then new ones."""
        if sweep.requeued:
            kind, run = "resume", self.runs[sweep.requeued.pop(0)]
        else:
            point = next(sweep.suggestions, None)
            if point is None:
                unfinished = any(run.state in ("pending", "running") for run in self.of_sweep(sweep.name))
                return None if unfinished else {"type": "exit"}
            kind, run = "run", Run(f"run{len(self.runs)}", sweep.project, sweep.name, point)
            self.runs[run.name] = run
        run.agents.append(agent)
        arguments = {name: {"value": value} for name, value in run.point.items()}
        return {"type": kind, "run_id": run.name, "program": sweep.config["program"], "args": arguments}

    def on_RunResumeStatus(self, v):
        run = self.runs.get(v["name"])
        bucket = None
        if run and run.exit_codes:
            bucket = {
                "id": f"id-{run.name}", "name": run.name, "displayName": run.attributes.get("displayName"),
                "summaryMetrics": json.dumps(run.summary),
                "config": json.dumps({k: {"value": v} for k, v in run.config.items()}),
                "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]",
                "tags": run.attributes.get("tags"), "notes": None, "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        entity = {"id": "e1", "name": ENTITY}
        return {"model": {"id": "p1", "name": v["project"], "entity": entity, "bucket": bucket}}

    def on_UpsertBucket(self, v):
        run = self.runs.setdefault(v["name"], Run(v["name"], v.get("project") or "uncategorized"))
        inserted = run.state == "pending"
        run.state = "running"
        run.sweep = run.sweep or v.get("sweep")
        if v.get("config"):
            run.config = {k: c["value"] for k, c in json.loads(v["config"]).items() if k != "_wandb"}
        run.attributes |= {
            k: v[k]
            for k in ("groupName", "jobType", "tags", "displayName", "program", "notes", "commit", "repo")
            if v.get(k) is not None
        }
        project = {"id": "p1", "name": run.project, "entity": {"id": "e1", "name": ENTITY}}
        bucket = {
            "id": f"id-{run.name}", "name": run.name, "displayName": run.attributes.get("displayName") or run.name,
            "description": None, "config": v.get("config") or "{}", "sweepName": run.sweep,
            "historyLineCount": len(run.history), "project": project,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, v):
        self.runs[v["run"]].files.update(v["files"])
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": f"id-{v['run']}", "uploadHeaders": [], "files": files}}

    def on_NotifyScriptableRunAlert(self, v):
        self.runs[v["runName"]].alerts.append((v["severity"], v["title"], v["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_UpsertView2(self, v):
        self.views.append(v)
        return {"upsertView": {"view": {"id": f"view{len(self.views)}", "name": v["name"]}, "inserted": True}}

    def on_upsertView(self, v):  # a report
        made = self.on_UpsertView2(v)
        project = {"id": "p1", "name": v["projectName"], "entityName": v["entityName"]}
        made["upsertView"]["view"] |= {"displayName": v["displayName"], "project": project, "spec": v["spec"]}
        return made

    # ---- metrics

    def file_stream(self, run: Run, body: dict[str, Any]) -> dict[str, Any]:
        for name, part in body.get("files", {}).items():
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        run.preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
            run.exit_codes.append(run.exit_code)
            run.state = "preempted" if run.preempting and run.exit_code else "failed" if run.exit_code else "finished"
            if run.state == "preempted" and run.sweep in self.sweeps:
                self.sweeps[run.sweep].requeued.append(run.name)
            run.preempting = False
        run.stop = run.stop or self.stop_when(run)
        return {"exitcode": None, "limits": {}} | ({"stopped": True} if run.stop else {})
