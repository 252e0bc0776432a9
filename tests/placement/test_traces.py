"""Readers of public traces, and what they say about files that are not traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.workload.traces import read_trace

DATA = Path(__file__).parent / "data"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("name", "format", "requests", "prompt_p50", "output_p50"),
    [
        ("azure2023_conv.csv.gz", "azure", 19366, 1020, 129),
        ("azure2023_code.csv.gz", "azure", 8819, 1469, 13),
        ("mooncake_conversation_head.jsonl.gz", "mooncake", 1500, None, None),
        ("nanoflow_sharegpt.csv.gz", "azure", 11758, None, None),
        ("vidur_arxiv_lengths.csv.gz", "vidur", 2826, None, None),
        ("splitwise_test_trace.csv", "splitwise", 3, 2048, 16),
    ],
)
def test_every_public_format_is_told_apart_and_read(
    name: str, format: str, requests: int, prompt_p50: int | None, output_p50: int | None
) -> None:
    trace = read_trace(DATA / name)
    assert (trace.format, trace.num_requests) == (format, requests)
    if prompt_p50:
        assert np.median(trace.prompt_tokens) == prompt_p50
        assert np.median(trace.output_tokens) == output_p50


def test_azure_times_keep_seven_digits_and_the_published_rate() -> None:
    arrival_s = read_trace(DATA / "azure2023_conv.csv.gz").arrival_s
    assert arrival_s is not None
    np.testing.assert_allclose(arrival_s[1], 50.9951690 - 46.6805900, atol=1e-6)
    assert 5.52 < len(arrival_s) / arrival_s[-1] < 5.54


def test_azure_2024_times_with_a_zone_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "azure2024.csv"
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n"
    file.write_bytes(b"\xef\xbb\xbf" + (AZURE + rows).encode())
    arrival_s = read_trace(file).arrival_s
    assert arrival_s is not None
    np.testing.assert_allclose(arrival_s, [0.0, 0.007405], atol=1e-6)


def test_a_header_may_have_spaces_and_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    text = "TIMESTAMP, ContextTokens, GeneratedTokens\r\n2023-11-16 18:15:46.68, 374, 44\r\n"
    file.write_bytes(text.encode("utf-8-sig"))
    assert read_trace(file).prompt_tokens.tolist() == [374]


@pytest.mark.parametrize(
    "stamps",
    [
        ("2023-11-16T18:15:46.5", "2023-11-16T18:15:47.25"),
        ("2023-11-16 18:15:46.5Z", "2023-11-16 18:15:47.25Z"),
        ("2023-11-16 20:15:46.5+02:00", "2023-11-16 18:15:47.25+00:00"),
    ],
)
def test_times_are_iso_8601_and_utc_where_they_name_no_zone(
    tmp_path: Path, stamps: tuple[str, str]
) -> None:
    file = tmp_path / "t.csv"
    file.write_text(AZURE + "".join(f"{stamp},1,2\n" for stamp in stamps))
    arrival_s = read_trace(file).arrival_s
    assert arrival_s is not None and arrival_s.tolist() == [0.0, 0.75]


def test_lines_without_content_count_only_for_the_numbers_of_others(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"\n \n{AZURE}\nXXX,374.0,44\n   \nXXX,3,4\n")
    assert read_trace(file).prompt_tokens.tolist() == [374, 3]
    file.write_text(f"\n{AZURE}\nXXX,374,44\n   \nXXX,3.5,4\n")
    with pytest.raises(InvalidConfig, match=r"t\.csv:6: .*whole"):
        read_trace(file)


def test_compressed_files_are_known_by_their_content(tmp_path: Path) -> None:
    text = f"{AZURE}XXX,3,4\n".replace("\n", "\r\n").encode("utf-8-sig")
    for name, content in (("a.csv", gzip.compress(text)), ("a.csv.gz", text)):
        (tmp_path / name).write_bytes(content)
        assert read_trace(tmp_path / name).num_requests == 1


def test_null_in_json_lines_is_as_good_as_missing(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    row = {"prompt_tokens": 3, "output_tokens": 4}
    file.write_text(json.dumps(row | dict.fromkeys(("arrival_s", "class", "prefix_ids"))))
    trace = read_trace(file)
    assert trace.arrival_s is None and trace.classes is None and trace.prefix is None


def test_burstgpt_is_read_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "burst.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    file.write_text(head + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,8,9,17,API log\n")
    trace = read_trace(file)
    assert trace.format == "burstgpt" and trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [0.0, 40.0] and trace.output_tokens.tolist() == [18, 9]


def test_block_hashes_of_64_unsigned_bits_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    row = {"prompt_tokens": 1024, "output_tokens": 2, "prefix_ids": [2**64 - 1, 2**63]}
    file.write_text(json.dumps(row))
    prefix = read_trace(file).prefix
    assert prefix is not None and len(set(prefix.of(0).tolist())) == 2


def test_lengths_without_times_have_no_arrivals() -> None:
    assert read_trace(DATA / "nanoflow_lmsys.csv.gz").arrival_s is None


def test_mooncake_prompts_that_share_a_prefix_share_its_ids() -> None:
    trace = read_trace(DATA / "mooncake_conversation_head.jsonl.gz")
    assert trace.prefix is not None and trace.prefix.block_tokens == 512
    assert trace.prefix.of(0)[0] == trace.prefix.of(1)[0] == 0
    blocks = -(-trace.prompt_tokens // 512)
    np.testing.assert_array_equal(np.diff(trace.prefix.offsets), blocks)


def test_own_json_lines_carry_classes_and_prefixes_and_are_sorted(tmp_path: Path) -> None:
    rows = [
        {"arrival_s": 9.0, "prompt_tokens": 3, "output_tokens": 4, "class": "b", "prefix_ids": [7]},
        {"arrival_s": 8.5, "prompt_tokens": 1, "output_tokens": 2},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    trace = read_trace(file)
    assert trace.arrival_s is not None and trace.arrival_s.tolist() == [0.0, 0.5]
    assert trace.classes == ("default", "b")
    assert trace.prefix is not None
    assert [trace.prefix.of(i).tolist() for i in range(2)] == [[], [7]]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (AZURE + "2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47.0,x,4\n", 3, "'x'"),
        (AZURE + "yesterday,374,44\n", 2, "yesterday"),
        (AZURE + "XXX,374\n", 2, "3 columns"),
        (AZURE + "XXX,0,44\n", 2, "0 is not 1 to"),
        (AZURE + "XXX,3000000000,44\n", 2, "3000000000 is not 1 to"),
        ('{"TIMESTAMP": 5, "ContextTokens": 1, "GeneratedTokens": 1}', 1, "azure"),
        ('\n{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": 1}', 3, "output_tokens"),
        ('{"prompt_tokens": 1, "output_tokens": 2, "prefix_ids": [1.5]}', 1, "whole numbers"),
        ('{"prompt_tokens": 1, "output_tokens": 2, "prefix_ids": "12"}', 1, "whole numbers"),
        ('{"prompt_tokens": ' + "[" * 100_000, 1, "recursion"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": 1', 2, "JSON"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": 1}', 2, "output_tokens"),
        ('{"prompt_tokens": 1.5, "output_tokens": 2}', 1, "whole"),
        ('{"prompt_tokens": 1, "output_tokens": 2, "arrival_s": NaN}', 1, "finite"),
        ('{"prompt_tokens": 1, "output_tokens": 2, "arrival_s": true}', 1, "finite"),
        ('{"prompt_tokens": ' + "9" * 5000 + ', "output_tokens": 2}', 1, "5000 digits"),
        ("a,b\n1,2\n", 1, "unknown trace columns"),
        (AZURE.replace("Gen", "ContextTokens,Gen") + "XXX,1,2,3\n", 1, "twice"),
        ("Timestamp,Request tokens,Response tokens\n5,472,18\n9,100,0\n", 3, "0 is not"),
    ],
)
def test_a_bad_line_is_named_with_its_number(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    file = tmp_path / "bad"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        read_trace(file)
    assert caught.value.where == f"{file}:{line}"
    assert reason in caught.value.reason


@pytest.mark.parametrize("text", ["", AZURE, "\n\n"])
def test_an_empty_trace_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "empty.csv"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match="no requests"):
        read_trace(file)


def test_a_missing_or_binary_or_mixed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_trace(tmp_path / "none.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidConfig, match="not a text file"):
        read_trace(binary)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes((DATA / "azure2023_code.csv.gz").read_bytes()[:500])
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_trace(cut)
    packed = bytearray((DATA / "azure2023_code.csv.gz").read_bytes())
    packed[200:260] = bytes(byte ^ 0x55 for byte in packed[200:260])
    cut.write_bytes(packed)
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_trace(cut)
    listed = tmp_path / "list.json"
    listed.write_text('[{"prompt_tokens": 1, "output_tokens": 2}]')
    with pytest.raises(InvalidConfig, match="one object a line"):
        read_trace(listed)
    mixed = tmp_path / "mixed.csv"
    mixed.write_text(AZURE + "XXX,1,1\n2023-11-16 18:15:46.68,1,1\n")
    with pytest.raises(InvalidConfig, match="1 of 2 rows"):
        read_trace(mixed)
    with pytest.raises(InvalidConfig, match="unknown trace format"):
        read_trace(mixed, "azur")
