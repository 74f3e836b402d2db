from __future__ import annotations

import time

import pytest

from timm_fsr.hub.privacy import holds_token, without_traces

TOKEN = "hf_" + "aB3" * 11
CASES = [
    ("/data/me/cifar10[test]", "cifar10[test]"),
    ("best PGD-10 accuracy on /data/me/cifar10[train] limited", "best PGD-10 accuracy on cifar10[train] limited"),
    ("~/me/x.npz", "x.npz"),
    ("C:\\me\\data\\x.npz", "x.npz"),
    ("https://a.org/b/c", "https://a.org/b/c"),
    ("eps 8/255", "eps 8/255"),
    ("uoft-cs/cifar10", "uoft-cs/cifar10"),
    ("runs/a/b", "runs/a/b"),
    ("file:///home/joe/secret/best", "best"),
    ("on file:/home/joe/x.npz.", "on x.npz."),
    ("../../joe/secret/x.npz[test]", "x.npz[test]"),
    ("on ../joe/x.npz, seed 0", "on x.npz, seed 0"),
    ("data/../../joe/x.npz", "x.npz"),
    ("..\\..\\joe\\x.npz", "x.npz"),
    ("\\\\server\\share\\joe\\x.npz", "x.npz"),
    ("//server/share/joe/x.npz", "x.npz"),
    ("on \\\\server\\joe\\x[test].", "on x[test]."),
    ("\\\\?\\C:\\Users\\joe\\x.npz", "x.npz"),
    ("'C:\\\\Users\\\\joe\\\\x.npz'", "'x.npz'"),
    ("hf-hub:/home/joe/m", "hf-hub:m"),
    ("hf-hub:../joe/m", "hf-hub:m"),
    ("hf-hub:~/joe/m", "hf-hub:m"),
    ("hf-hub:C:\\Users\\joe\\m", "hf-hub:m"),
    ("local-dir:/home/joe/runs/m/best", "local-dir:m"),
    ("local-dir:runs/joe/m/last", "local-dir:m"),
    ("transfer from local-dir:../joe/m", "transfer from local-dir:m"),
    ("hf-hub:owner/name@v2", "hf-hub:owner/name@v2"),
    ("hf_hub:owner/name", "hf_hub:owner/name"),
    ("~joe/x", "x"),
    ("/home/joe", "~"),
    ("/home/joe/", "~"),
    ("C:\\Users\\joe", "~"),
    ("~joe/", "~"),
    ("$HOME/joe/x", "x"),
    ("${SCRATCH}/joe/x", "x"),
    ("%USERPROFILE%\\joe\\x", "x"),
    ("file://nas.corp.example/share/joe/x.npz", "x.npz"),
    ("file:///C:/Users/joe/x.npz", "x.npz"),
    ("smb://nas/joe/x", "x"),
    ("sftp://joe@nas/home/joe/x", "x"),
    ("joe@nas:/home/joe/x.npz", "x.npz"),
    ("joe@nas.corp:~/x.npz", "x.npz"),
    ("https://joe:hunter2@a.org/x.npz", "https://a.org/x.npz"),
    ("https://hf_abcdefghijklmnopqrst@a.org/x", "https://a.org/x"),
    ("https://a.org/x.npz?token=abc&split=test", "https://a.org/x.npz?token=***&split=test"),
    (
        "https://a.org/x?X-Amz-Signature=0123&X-Amz-Credential=AKIA/1",
        "https://a.org/x?X-Amz-Signature=***&X-Amz-Credential=***",
    ),
    ("https://a.org/x#access_token=abc", "https://a.org/x#access_token=***"),
    ("git+https://joe:pw@a.org/x.git", "git+https://a.org/x.git"),
    ("s3://key:secret@bucket/x", "s3://bucket/x"),
    ("joe:hunter2@db.corp.org/x", "db.corp.org/x"),
    ("hf-hub:https://joe:pw@hub.org/o/n", "hf-hub:https://hub.org/o/n"),
    ("hf-hub:owner/name?token=abcdefgh", "hf-hub:owner/name?token=***"),
    ("by hf_abcdefghijklmnopqrstuvwx.", "by ***."),
    ("password=hunter22 rest", "password=*** rest"),
    ("class_token=False, reg_tokens=4", "class_token=False, reg_tokens=4"),
    ("PGD(eps=0.1, restarts=1)", "PGD(eps=0.1, restarts=1)"),
    ("data:/home/joe/x", "data:x"),
    ("(/home/joe/x)", "(x)"),
    ("/home/joe/a,b/secret/x, 3", "x, 3"),
    ("a / b, and/or 3", "a / b, and/or 3"),
    ("best PGD-10 accuracy", "best PGD-10 accuracy"),
    ("hf-hub:timm-fsr/a.b_c", "hf-hub:timm-fsr/a.b_c"),
    ("1000 of 60000, seed 0 ... and", "1000 of 60000, seed 0 ... and"),
    ("https://a.org/~joe/x/y", "https://a.org/~joe/x/y"),
    ("https://a.org/a/../b", "https://a.org/a/../b"),
    ("x at http://127.0.0.1:8000/a/b?c=d.", "x at http://127.0.0.1:8000/a/b?c=d."),
    ("top:acc@1.5", "top:acc@1.5"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_where_things_lay_is_nobodys_business(text, expected):
    assert without_traces({"a": [text]}) == {"a": [expected]}
    assert without_traces({text: 1}) == {expected: 1}, "names of stages have paths too"
    assert without_traces(expected) == expected, "once is enough"


def test_paths_that_are_known_may_have_spaces():
    assert without_traces("/my data/sets/x and /my data/sets/x", {"/my data/sets/x": "x"}) == "x and x"
    assert without_traces([3, None, True, 0.5]) == [3, None, True, 0.5]


def test_a_home_may_have_spaces(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/jane doe")
    assert without_traces("on /home/jane doe/sets/x[test]") == "on x[test]"


def test_secrets_by_the_name_of_their_key():
    secret = dict.fromkeys(("token", "hf_token", "api_key", "password"), "abc")
    plain = dict.fromkeys(("class_token", "key", "tokens"), "abc")
    assert without_traces({**plain, "a": secret}) == {**plain, "a": dict.fromkeys(secret, "***")}


def test_tokens_are_found_by_form_or_as_the_one_in_use():
    assert holds_token(f"x {TOKEN}.")
    assert holds_token("x of-my-company y", "of-my-company")
    assert not holds_token("x y hf_hub_download HF_TOKEN", "x")


@pytest.mark.parametrize("piece", ["a:", "/a", "(a/", ",a/", "a b/../", "x@y:", "local-dir:", "https://", "~a(", "a_"])
def test_long_texts_take_no_time(piece):
    begun = time.process_time()
    without_traces(piece * 20_000)
    assert time.process_time() - begun < 5, "it was minutes"
