"""Hostfiles, names and values of launch settings: read as the tools read them, or refused before anything starts."""

from __future__ import annotations

import argparse
import re

import pytest

from es_megatron.errors import ConfigError
from es_megatron.launch.command import add_arguments, run_launch
from es_megatron.launch.hostfile import Cluster, read_hostfile
from es_megatron.launch.names import host_fault, is_loopback
from es_megatron.launch.settings import SlurmSettings, load_launch

RUN = ["--", "pretrain", "--config", "run.yaml"]
TWO = "10.0.0.1 slots=8\n10.0.0.2 slots=8\n"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        (TWO, ("10.0.0.1", "10.0.0.2")),
        ("# racks\n\n a slots=8 # head\n\tb\tslots=8\n", ("a", "b")),
        ("a slots=8\r\nb slots=8\r\n", ("a", "b")),
        ("a slots=8 max_slots=8\nb slots=8 max-slots=9 # mpi\n", ("a", "b")),
        ("alice@10.0.0.1 slots=8\nbob@node_2.rack-1 slots=8", ("10.0.0.1", "node_2.rack-1")),
    ],
)
def test_hostfiles_of_deepspeed_are_read(text, hosts, tmp_path):
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode())
    assert read_hostfile(path, pdsh=True) == Cluster(hosts, 2, 8)


@pytest.mark.parametrize(
    ("text", "line", "cure"),
    [
        ("a slots=8\na slots=8\n", 2, "again, after line 1. Leave one of them"),
        ("# two\na slots=8\n\nA slots=8\n", 4, "again, after line 2"),
        ("alice@a slots=8\nbob@a slots=8\n", 2, "names `a` again"),
        ("a slots=8\nb slots = 8\n", 2, "Leave out the spaces around `=`"),
        ("a slots= 8\n", 1, "Leave out the spaces around `=`"),
        ("a slots=0\n", 1, "at least 1 slot"),
        ("a slots=8 max_slots=4\n", 1, "no more than `max_slots`"),
        ("a slots=8\nb slots=4\n", 2, "must have `slots=8`"),
        ("a\n", 1, "must be `HOST slots=N`"),
        ("a gpus=4\n", 1, "must be `HOST slots=N`"),
        ("a slots=8x\n", 1, "must be `HOST slots=N`"),
        ("a slots=8 b slots=8\n", 1, "must be `HOST slots=N`"),
        ("a slots=8\x0cb slots=8\n", 1, "must be `HOST slots=N`"),
        ("node[01-04] slots=8\n", 1, "is a range"),
        ("a,b slots=8\n", 1, "is no name of a host"),
        ("10.0.0.1:2222 slots=8\n", 1, "has a port: leave it out here, and set `ssh_port`"),
        ("[fd00::1]:22 slots=8\n", 1, "is a range, or an address with a port"),
        ("fd00::1 slots=8\n", 1, "pdsh cannot take the IPv6 address"),
        ("10.0.0.256 slots=8\n", 1, "is no IPv4 address"),
        ("10.1 slots=8\n", 1, "is no IPv4 address"),
        ("-oProxyCommand=x slots=8\n", 1, "is no name of a host"),
        ("alice@-oProxyCommand=x slots=8\n", 1, "is no name of a host"),
        ("-l@a slots=8\n", 1, "is no name of a user"),
        ("a;touch${IFS}x slots=8\n", 1, "is no name of a host"),
        ("$(x)@a slots=8\n", 1, "is no name of a user"),
        ("zürich slots=8\n", 1, "is no name of a host"),
        ("\ufeffa slots=8\n", 1, "byte order mark"),
        (b"a slots=8\nb slots=8 # Z\xfcrich\n", 2, "must be UTF-8, but has the byte 0xfc"),
        (b"\xff\xfea\x00\n", 1, "byte order mark"),
    ],
)
def test_other_lines_are_refused_with_their_number(text, line, cure, tmp_path):
    path = tmp_path / "hostfile"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"Line {line} of .*{re.escape(cure)}"):
        read_hostfile(path, pdsh=True)


@pytest.mark.parametrize("text", ["", "# nobody\n\n"])
def test_a_hostfile_without_hosts_is_refused(text, tmp_path):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError, match="must name at least one host"):
        read_hostfile(tmp_path / "hostfile", pdsh=True)


def test_ipv6_addresses_lose_their_brackets_and_are_compared_by_value(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("fd00::1 slots=1\n[fd00::2] slots=1\n")
    assert read_hostfile(path, pdsh=False).hosts == ("fd00::1", "fd00::2")
    path.write_text("fd00::1 slots=1\n[FD00:0::1] slots=1\n")
    with pytest.raises(ConfigError, match=r"Line 2 .* again"):
        read_hostfile(path, pdsh=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]", "0.0.0.0", "::"])
def test_addresses_of_every_machine_are_known(host):
    assert is_loopback(host)
    assert host_fault(host) is None  # one node may use them


@pytest.mark.parametrize("host", ["10.0.0.1", "node1", "fd00::1", "localhost-2"])
def test_others_are_not_taken_for_them(host):
    assert not is_loopback(host)


def test_a_link_local_address_with_a_zone_is_refused():
    assert "zone" in str(host_fault("fe80::1%eth0"))


def dry(path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_launch(parser.parse_args(["--config", str(path), "--dry-run", *more, *RUN]))


def refused(path, *more: str) -> str:
    with pytest.raises(ConfigError) as told:
        dry(path, *more)
    return str(told.value)


def launch_file(tmp_path, lines: str, hosts: str = TWO) -> str:
    (tmp_path / "hostfile").write_text(hosts)
    path = tmp_path / "launch.yaml"
    path.write_text(f"hostfile: hostfile\ninterface: eth0\n{lines}\n")
    return str(path)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("true", "true"),
        ("1", "1"),
        ("1e3", "1e3"),
        ("0755", "0755"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        (".inf", ".inf"),
        ('"a b"', "a b"),
        ('""', ""),
        ("!!int 5", "5"),
    ],
)
def test_values_of_variables_are_taken_as_they_are_written(written, value, tmp_path):
    path = launch_file(tmp_path, f"environment:\n  A_B: {written}\n  NO: x\n")
    assert load_launch(tmp_path / "launch.yaml").environment == {"A_B": value, "NO": "x"}, path


def test_merged_variables_are_text_too(tmp_path):
    launch_file(tmp_path, "environment:\n  <<: {A: off, B: 010}\n  B: 1e3\n")
    assert load_launch(tmp_path / "launch.yaml").environment == {"A": "off", "B": "1e3"}


def test_a_time_limit_needs_no_quotes(tmp_path):
    launch_file(tmp_path, "slurm: {time: 24:00:00, job_name: 007, options: [--exclusive]}")
    slurm = load_launch(tmp_path / "launch.yaml").slurm
    assert (slurm.time, slurm.job_name, slurm.options) == ("24:00:00", "007", ("--exclusive",))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("environment: {A: null}", "`A` in `environment` .* must be text, but is None"),
        ("environment: {A: }", "`A` in `environment` .* must be text, but is None"),
        ("environment: {A: [1, 2]}", "`A` in `environment` .* must be text"),
        ("environment: {A: {B: 1}}", "`A` in `environment` .* must be text"),
        ('environment: {A: "x\\0y"}', "`A` in `environment` .* must be text"),
        ("environment: off", "`environment` .* must be a mapping"),
        ("environment: []", "`environment` .* must be a mapping"),
        ("environment: {A-B: x}", "must be letters, digits and `_`.*'A-B'"),
        ("environment: {1A: x}", "must be letters, digits and `_`.*'1A'"),
        ('environment: {"A;touch x;B": x}', "must be letters, digits and `_`"),
        ('environment: {"A\\nB": x}', "must be letters, digits and `_`"),
        ("environment: {A: 1, A: 2}", "the key `A` twice"),
        ("environment: {MASTER_ADDR: 10.0.0.9}", "must not have `MASTER_ADDR`.*`master_addr`"),
        ("environment: {RANK: 0}", "must not have `RANK`"),
        ("interface: ib0", "the key `interface` twice"),
        ("master_addr: -oProxyCommand=x", "`master_addr`: .* is no name of a host"),
        ("master_addr: 10.0.0.1:29500", "`master_addr`: .* has a port"),
        ("master_addr: a;touch${IFS}x", "`master_addr`: .* is no name of a host"),
        ('master_addr: "a\\nb"', "`master_addr`: .* is no name of a host"),
        ("ssh_port: 70000", "`ssh_port` must be in"),
        ('slurm: {job_name: "a\\n#SBATCH --uid=0"}', "`slurm.job_name` must be of letters"),
        ('slurm: {job_name: "a\\n"}', "`slurm.job_name` must be of letters"),
        ("slurm: {job_name: 'a;touch${IFS}x'}", "`slurm.job_name` must be of letters"),
        ("slurm: {job_name: -J}", "`slurm.job_name` must be of letters"),
        ("slurm: {partition: 'a b'}", "`slurm.partition` must be of letters"),
        ('slurm: {account: "a\\nb"}', "`slurm.account` must be of letters"),
        ("slurm: {time: tomorrow}", "`slurm.time` must be a time limit"),
        ("slurm: {signal: USR1@120}", "`slurm.signal` must be TERM"),
        ("slurm: {signal: 'B:TERM@120'}", "`slurm.signal` must be TERM"),
        ('slurm: {options: ["--gres=gpu:8\\nrm -r x"]}', "must be single options of sbatch"),
        ("slurm: {options: ['--comment=two words']}", "must be single options of sbatch"),
        ("slurm: {options: ['--comment=a#b']}", "must be single options of sbatch"),
        ("slurm: {options: [exclusive]}", "must be single options of sbatch"),
        ("slurm: {options: [--nodes=3]}", "must leave `--nodes` to `nodes` or the hostfile"),
        ("slurm: {options: [-N3]}", "must leave `-N` to `nodes` or the hostfile"),
        ("slurm: {options: ['-J x']}", "must leave `-J` to `slurm.job_name`"),
        ("slurm: {job_name: [a]}", "job_name` must be of type str"),
    ],
)
def test_values_that_tools_would_misread_are_refused(lines, message, tmp_path, capsys):
    path = launch_file(tmp_path, lines)
    said = refused(path)
    assert re.search(message, said), said
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "option",
    [
        "--gres=gpu:8",
        "--cpus-per-task=12",
        "--exclusive",
        "-c12",
        "-c 12",
        "--constraint=a100&nvlink",
        "--array=1-10%1",
        "--nodelist=node[1-4,7]",
        "--output=logs/%x-%j.out",
        '--comment="two words"',
    ],
)
def test_options_of_sbatch_pass(option):
    assert SlurmSettings(options=(option,)).options == (option,)


@pytest.mark.parametrize("value", ["TERM@120", "SIGTERM@60", "15", "R:TERM@300"])
def test_signals_that_the_run_saves_on_pass(value):
    assert SlurmSettings(signal=value).signal == value


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ("launcher: no-ssh", [], "`--node-rank` must be given for launcher `no-ssh` with 2 nodes"),
        ("launcher: torchrun", [], "`--node-rank` must be given for launcher `torchrun` with 2 nodes"),
        ("launcher: torchrun", ["--node-rank", "2"], r"`--node-rank` must be in \[0, 2\), but is 2"),
        ("launcher: no-ssh", ["--node-rank", "-1"], r"`--node-rank` must be in \[0, 2\), but is -1"),
        ("launcher: pdsh", ["--node-rank", "0"], "`--node-rank` must be left out for launcher `pdsh`"),
        ("launcher: slurm", ["--node-rank", "0"], "`--node-rank` must be left out for launcher `slurm`"),
        ("master_addr: 127.0.0.1", [], "`master_addr` must be an address that the other nodes reach"),
        ("master_addr: localhost", [], "`master_addr` must be an address that the other nodes reach"),
        (
            "{launcher: torchrun, master_addr: '[::1]'}",
            ["--node-rank", "1"],
            "`master_addr` must be an address that the other nodes reach",
        ),
    ],
)
def test_nodes_that_would_never_meet_are_refused(lines, more, message, tmp_path):
    path = launch_file(tmp_path, lines.strip("{}").replace(", ", "\n"))
    assert re.search(message, refused(path, *more))


def test_a_first_host_that_is_everybodys_own_is_refused_but_alone(tmp_path):
    path = launch_file(tmp_path, "", "localhost slots=8\n10.0.0.2 slots=8\n")
    assert "The first host of" in refused(path)
    path = launch_file(tmp_path, "", "localhost slots=8\n")
    assert dry(path) == 0


def test_loopback_is_no_interface_between_nodes(tmp_path):
    (tmp_path / "hostfile").write_text(TWO)
    path = tmp_path / "launch.yaml"
    path.write_text("hostfile: hostfile\ninterface: lo\n")
    assert "not be lo" in refused(path)
    path.write_text("hostfile: hostfile\ninterface: eth0;x\n")
    assert "`interface` must be a network interface" in refused(path)


def test_settings_in_latin_1_are_refused_and_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "hostfile").write_text(TWO)
    path = tmp_path / "launch.yaml"
    text = "hostfile: hostfile\ninterface: eth0\n# Zürich\n"
    path.write_bytes(text.encode("latin-1"))
    assert "YAML in UTF-8" in refused(path)
    path.write_bytes(text.encode("utf-8-sig"))
    assert dry(path) == 0


def test_a_folder_that_shells_would_take_apart_is_refused_for_pdsh(tmp_path, monkeypatch):
    path = launch_file(tmp_path, "")
    folder = tmp_path / "my run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "The current folder must have no spaces" in refused(path)
    assert dry(path, "--launcher", "no-ssh", "--node-rank", "0") == 0
