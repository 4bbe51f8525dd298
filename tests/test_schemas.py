"""What `--json` prints is what the schemas say, and they say everything that it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cases import BY_NAME, save
from conftest import read
from jsonschema import Draft202012Validator

from hesscli.schemas import commands, schema

SCHEMAS = {command: schema(command) for command in commands()}


def undocumented(value: Any, part: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """The keys of a document that no schema mentions."""
    properties: dict[str, Any] = {}
    others = None
    parts = [part]
    while parts:
        here = parts.pop()
        if "$ref" in here:
            parts.append(root["$defs"][here["$ref"].removeprefix("#/$defs/")])
        parts += here.get("anyOf", [])
        properties = here.get("properties", {}) | properties
        others = here.get("additionalProperties", others)
        if isinstance(value, list) and "items" in here:
            for item in value:
                yield from undocumented(item, here["items"], root)
    if isinstance(value, dict) and properties:
        for key, item in value.items():
            if key in properties:
                yield from undocumented(item, properties[key], root)
            elif others is None:
                yield key


def check(command: str, document: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMAS[command]).validate(document)
    assert list(undocumented(document, SCHEMAS[command], SCHEMAS[command])) == []


@pytest.mark.parametrize("command", commands())
def test_schemas_are_schemas(cli, command):
    Draft202012Validator.check_schema(SCHEMAS[command])
    ran = cli("--schema", command)
    assert ran.code == 0
    assert ran.document == SCHEMAS[command]
    assert SCHEMAS[command]["properties"]["schema"]["const"].startswith("hesscli.")
    with pytest.raises(Exception, match=r"is a required property|is not valid under any"):
        check(command, {})


def test_every_command_with_json_has_one(cli):
    from hesscli.cli import app

    named = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert named == set(commands())
    assert cli("--schema", "nothing").code == 2


@pytest.mark.parametrize("blocks", ["diag", "module", "full", "elements"])
@pytest.mark.parametrize("case", ["mlp-tanh", "tied-names"])
def test_compute_and_show_and_the_file(cli, tmp_path, case, blocks):
    model, data = save(BY_NAME[case], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME[case].arguments(), "-b", blocks, "--json")
    for options in ((), ("--no-check", "--stats", "none"), ("--dry-run",)):
        ran = cli(*command, *options)
        assert ran.code == 0, ran.stderr
        check("compute", ran.document)
    scaled = ("--scale", "x=2") if case == "mlp-tanh" else ()
    ran = cli(*command, "--samples", "4", *scaled, "--dry-run")
    assert ran.code == 0, ran.stderr
    check("compute", ran.document)
    check("compute", read(tmp_path / "hessian.safetensors")[0])
    check("show", cli("show", "--wide", "--json").document)
    check("show", cli("show", "--json").document)
    for which in ("largest", "smallest", "magnitude"):
        check("eigen", cli("eigen", "--which", which, "--top", 3, "--json").document)


def test_a_shard(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    ran = cli("compute", model, data, *BY_NAME["mlp-tanh"].arguments(), "--shard", "1/2", "--json")
    check("compute", ran.document)
    assert ran.document["shard"] == [1, 2]
    assert ran.notes[-1].endswith("hesscli merge hessian.safetensors")


def test_diff(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME["mlp-tanh"].arguments(), "-q", "-o")
    assert cli(*command, "a").code == cli(*command, "b", "--params", "*.weight").code == 0
    assert cli(*command, "c", "--stats", "none", "--blocks", "elements").code == 0
    for other in ("a", "b", "c"):
        check("diff", json.loads(cli("diff", "a", other, "--force", "--json").stdout))


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_commands_without_a_matrix(cli, tmp_path, curvature):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    of_model = (model, data, *BY_NAME["mlp-tanh"].arguments(), "--curvature", curvature, "--json")
    check("eigen", cli("eigen", *of_model, "--top", 3).document)
    check("eigen", cli("eigen", *of_model, "--per-block").document)
    check("trace", cli("trace", *of_model).document)
    check("density", cli("density", *of_model).document)
    check("hvp", cli("hvp", *of_model, "--vector", "random", "--gradient").document)
    if curvature == "hessian":
        ran = cli(
            "hvp", *of_model, "--per-fedavg", 0.1, "--query", data, "-o", "fedavg.safetensors"
        )
        check("hvp", ran.document)
        assert cli("compute", *of_model[:-1], "-q").code == 0
        check("density", cli("density", "--json").document)


@pytest.mark.parametrize("command", [("trace",), ("eigen", "--top", "2"), ("density",)])
def test_commands_without_a_check(cli, tmp_path, command):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    name, *options = command
    ran = cli(name, model, data, *BY_NAME["mlp-tanh"].arguments(), *options, "--no-check", "--json")
    check(name, ran.document)


def test_a_wrong_document_is_refused():
    with pytest.raises(Exception, match="is not of type 'number', 'null'"):
        check("eigen", {
            "schema": "hesscli.eigen/1", "which": "largest", "eigenvalues": ["NaN"],
            "residuals": [], "blocks": [], "converged": True, "hessian": "h",
        })  # fmt: skip
