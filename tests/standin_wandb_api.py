"""What W&B's public API reads of the server for tests: runs, their configurations, histories and files."""

from __future__ import annotations

import json
import re
from typing import Any

from standin_wandb_artifacts import ENTITY, PAGE


class PublicApi:
    """What `StandInServer` answers to `wandb.Api`."""

    url: str
    runs: dict[str, Any]
    sweeps: dict[str, Any]
    contents: dict[str, bytes]

    def on_Runs(self, v):
        asked = re.search(r'"sweep": *"([^"]+)"', v.get("filters") or "")
        found = [run for run in self.runs.values() if run.project == v["project"]]
        found = [run for run in found if asked is None or run.sweep == asked[1]]
        edges = [{"node": self.described_run(run), "cursor": run.name} for run in found]
        return {
            "project": {
                "internalId": "1", "runCount": len(found), "readOnly": False,
                "runs": {"edges": edges, "pageInfo": PAGE},
            }
        }  # fmt: skip

    def on_GetSweep(self, v):
        sweep = self.sweeps[v["name"]]
        found = {"__typename": "Sweep", "id": f"id-{sweep.name}", "name": sweep.name, "state": "FINISHED"}
        return {"project": {"sweep": found | {"bestLoss": None, "config": sweep.text}}}

    def on_GetProjects(self, v):
        return {"models": {"pageInfo": PAGE, "edges": []}}

    def on_CreateProject(self, v):
        return {"upsertModel": {"project": {"id": "p1"}, "model": {"id": "p1"}, "inserted": True}}

    def on_ProjectInternalId(self, v):
        return {"project": {"internalId": "1"}}

    def on_Run(self, v):
        return {"project": {"run": self.described_run(self.runs[v["name"]])}}

    on_RunHistoryKeys = on_Run

    def on_RunParquetHistory(self, v):
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def on_SampledHistoryPage(self, v):
        asked = json.loads(v["spec"])
        rows = [row for row in self.runs[v["run"]].history if asked["minStep"] <= row["_step"] <= asked["maxStep"]]
        keys = set(asked["keys"])
        return {"project": {"run": {"sampledHistory": [[{k: r[k] for k in keys} for r in rows if keys <= set(r)]]}}}

    def on_RunFiles(self, v):
        run = self.runs[v["name"]]
        names = [name for name in sorted(run.files) if not v["fileNames"] or name in v["fileNames"]]
        edges = []
        for name in names:
            path = f"/upload/{run.name}/{name}"
            node = {
                "id": name, "name": name, "url": self.url + path, "directUrl": self.url + path,
                "sizeBytes": len(self.contents[path]), "mimetype": "", "updatedAt": None, "md5": None,
            }  # fmt: skip
            edges.append({"node": node, "cursor": name})
        files = {"fileCount": len(names), "files": {"edges": edges, "pageInfo": PAGE}}
        return {"project": {"internalId": "1", "run": files}}

    def described_run(self, run: Any) -> dict[str, Any]:
        keys = {key: {"typeCounts": [{"type": "number"}]} for row in run.history for key in row}
        return {
            "id": f"id-{run.name}", "projectId": "1", "name": run.name, "tags": run.attributes.get("tags"),
            "displayName": run.attributes.get("displayName"), "sweepName": run.sweep, "state": run.state,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "group": run.attributes.get("groupName"), "jobType": run.attributes.get("jobType", "train"),
            "commit": run.attributes.get("commit"),
            "readOnly": False, "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z",
            "description": None, "notes": None, "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history), "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": {"keys": keys, "lastStep": len(run.history) - 1, "sets": []},
        }  # fmt: skip
