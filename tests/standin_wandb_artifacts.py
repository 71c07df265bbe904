"""Artifacts of the W&B server for tests: collections of versions with aliases, their files, lineage, deletion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ENTITY = "tester"


class Refused(Exception):
    """What the server answers with an error."""


@dataclass
class Version:
    """One version of an artifact."""

    id: str
    project: str
    collection: str
    type: str
    index: int
    digest: str
    asked_aliases: list[str]
    metadata: str | None
    run: str | None
    aliases: set[str] = field(default_factory=set)
    state: str = "PENDING"
    manifest: str = ""  # where it was put
    files: dict[str, str] = field(default_factory=dict)  # name -> where it was put

    @property
    def name(self) -> str:
        return f"{self.collection}:v{self.index}"


class Artifacts:
    """What `StandInServer` answers about artifacts.

    Attributes:
        versions: all versions that were ever made, in order; a deleted one has the state DELETED.
        used: (run, id of a version), for every input of a run.
        refuse_uploads: answer every new artifact with an error.
    """

    url: str

    def __init__(self):
        self.versions: list[Version] = []
        self.used: list[tuple[str, str]] = []
        self.contents: dict[str, bytes] = {}  # path of an upload -> what was put there
        self.refuse_uploads = False

    def version(self, id: str) -> Version:
        return next(version for version in self.versions if version.id == id)

    def there(self, collection: str) -> list[Version]:
        """The versions of a collection that are complete and not deleted."""
        return [v for v in self.versions if v.collection == collection and v.state == "COMMITTED"]

    def file_of(self, version: Version, name: str) -> bytes:
        return self.contents[version.files[name]]

    # ---- made and filled

    def on_CreateArtifact(self, v):
        if self.refuse_uploads:
            raise Refused("the storage is full")
        given = v["input"]
        collection = given["artifactCollectionName"]
        index = sum(other.collection == collection for other in self.versions)
        version = Version(
            f"artifact{len(self.versions)}", given["projectName"], collection, given["artifactTypeName"], index,
            given["digest"], [alias["alias"] for alias in given.get("aliases") or []], given.get("metadata"),
            given.get("runName"),
        )  # fmt: skip
        self.versions.append(version)
        made = {"id": version.id, "state": version.state, "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def on_CreateArtifactManifest(self, v):
        version = self.version(v["artifactID"])
        version.manifest = f"/upload/{version.id}/manifest"
        file = {"id": f"manifest-{version.id}"}
        if v.get("includeUpload"):
            file |= {"uploadUrl": self.url + version.manifest, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{version.id}", "file": file}}}

    def on_UpdateArtifactManifest(self, v):
        version = self.version(v["artifactManifestID"].removeprefix("manifest-"))
        file = {"id": v["artifactManifestID"], "uploadUrl": self.url + version.manifest, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": v["artifactManifestID"], "file": file}}}

    def on_CreateArtifactFiles(self, v):
        edges = []
        for file in v["input"]["artifactFiles"]:
            version = self.version(file["artifactID"])
            path = version.files[file["name"]] = f"/upload/{version.id}/{file['name']}"
            node = {
                "storagePath": path, "uploadUrl": self.url + path, "uploadHeaders": [], "uploadMultipartUrls": None,
                "artifact": {"id": version.id},
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, v):
        version = self.version(v["artifactID"])
        version.state = "COMMITTED"
        for alias in {*version.asked_aliases, "latest"}:  # W&B moves `latest` to whatever came last
            for other in self.there(version.collection):
                other.aliases.discard(alias)
            version.aliases.add(alias)
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def on_UseArtifact(self, v):
        given = v.get("input") or v
        self.used.append((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def on_ArtifactType(self, v):
        found = self.there(v["name"].partition(":")[0])
        return {"project": {"artifact": {"artifactType": {"name": found[0].type}} if found else None}}

    # ---- found, read, deleted

    def on_ArtifactByID(self, v):
        return {"artifact": self.described(self.version(v["id"]))}

    def on_ArtifactMembershipByName(self, v):
        name, _, alias = v["name"].partition(":")
        found = [x for x in self.there(name) if x.project == v["project"] and alias in {*x.aliases, f"v{x.index}"}]
        return {"project": {"artifactCollectionMembership": self.membership(found[0]) if found else None}}

    def on_ProjectArtifacts(self, v):
        found = [version for version in self.there(v["collection"]) if version.project == v["project"]]
        edges = [{"version": f"v{version.index}", "node": self.described(version)} for version in found]
        artifacts = {"totalCount": len(edges), "pageInfo": PAGE, "edges": edges}
        collection = {"__typename": "ArtifactSequence", "artifacts": artifacts}
        return {"project": {"artifactType": {"artifactCollection": collection}}}

    def on_FetchArtifactManifest(self, v):
        file = {"directUrl": self.url + self.version(v["id"]).manifest}
        return {"artifact": {"currentManifest": {"file": file}}}

    def on_ArtifactManifest(self, v):
        return self.on_FetchArtifactManifest({"id": v["artifact_id"]})

    def on_ArtifactFileURLsByManifestEntries(self, v):
        version = self.version(v["id"])
        edges = [{"node": {"name": n, "directUrl": self.url + path}} for n, path in version.files.items()]
        return {"artifact": {"filesByManifestEntries": {"pageInfo": PAGE, "edges": edges}}}

    def on_GetArtifactMembershipFileUrls(self, v):
        found = [x for x in self.there(v["collection"]) if v["alias"] in {*x.aliases, f"v{x.index}"}]
        nodes = [{"__typename": "File", "name": n, "directUrl": self.url + p} for n, p in found[0].files.items()]
        files = {"pageInfo": PAGE, "edges": [{"node": node} for node in nodes]}
        membership = {"artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": {"__typename": "ArtifactSequence"} | membership}}

    def on_DeleteArtifact(self, v):
        version = self.version(v["input"]["artifactID"])
        assert not version.aliases, "W&B refuses to delete what has an alias"
        version.state = "DELETED"
        return {"result": {"artifact": {"id": version.id}}}

    def described(self, version: Version) -> dict[str, Any]:
        project = {"id": "p1", "internalId": "1", "name": version.project, "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": version.collection, "project": project}
        return {
            "__typename": "Artifact", "id": version.id, "artifactSequence": collection, "versionIndex": version.index,
            "artifactType": {"name": version.type}, "description": None, "metadata": version.metadata,
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None, "state": version.state,
            "size": 1, "digest": version.digest, "digestAlgorithm": None, "commitHash": "c", "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z",
            "aliases": [
                {"__typename": "ArtifactAlias", "id": a, "alias": a, "artifactCollection": collection}
                for a in sorted(version.aliases)
            ],
        }  # fmt: skip

    def membership(self, version: Version) -> dict[str, Any]:
        described = self.described(version)
        return {
            "__typename": "ArtifactCollectionMembership", "id": f"m-{version.id}", "versionIndex": version.index,
            "createdAt": described["createdAt"], "aliases": described["aliases"],
            "artifactCollection": described["artifactSequence"], "artifact": described,
        }  # fmt: skip


PAGE = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
