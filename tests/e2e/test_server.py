"""The server as its clients see it: OpenAI's own client, raw sockets, load, faults, shutdown."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from deploy import server_app  # noqa: E402
from deploy.__main__ import main  # noqa: E402
from deploy.text import load_text  # noqa: E402
from tests.server_fakes import (  # noqa: E402
    FakeRunner,
    Running,
    http_bytes,
    raw_connection,
    running_server,
)

PROMPT = "The river rises in the hills"
USER = {"role": "user", "content": "Count the boats"}
STREAMS = 64
MUTATIONS = 1000


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("text")
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(text_directory: Path) -> Iterator[Running]:
    with running_server(FakeRunner(), text_directory) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with make_client(server) as made:
        yield made


def make_client(server: Running, key: str = "none", **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **options)


def expected_text(directory: Path, prompt: str, max_new: int) -> str:
    """Greedy continuation by the fake engine's definition, one row without a cache."""
    text, runner = load_text(directory), FakeRunner()
    ids = text.encode(prompt)
    answer: list[int] = []
    while len(answer) < max_new:
        array = np.array([*ids, *answer])
        answer.append(int(runner._logits(array, np.arange(len(array))).argmax()))
        if answer[-1] in runner.eos_token_ids:
            break
    return text.decode([*ids, *answer])[len(text.decode(ids)) :]


def post(server: Running, path: str, body: bytes, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, JSON body) of one raw POST."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        merged = {"Content-Type": "application/json", **headers}
        connection.request("POST", path, body, merged)
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read() or b"null")
    finally:
        connection.close()


def get(server: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def body_of(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": PROMPT, **fields}).encode()


# The openai client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "budgeted-lora"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_completion_is_the_engines_greedy_text(client: Any, text_directory: Path) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30)
    assert found.choices[0].text == expected_text(text_directory, PROMPT, 30)
    assert found.choices[0].finish_reason == "length"
    prompt_tokens = len(load_text(text_directory).encode(PROMPT))
    assert found.usage.prompt_tokens == prompt_tokens
    assert found.usage.completion_tokens == 30
    assert found.usage.total_tokens == prompt_tokens + 30


def test_streaming_gives_the_same_text_and_usage(client: Any, text_directory: Path) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected_text(
        text_directory, PROMPT, 30
    )
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 10


def test_chat_streamed_and_whole(client: Any, text_directory: Path) -> None:
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_completion_tokens": 20}
    whole = client.chat.completions.create(messages=[USER], **options)
    text = load_text(text_directory)
    prompt = text.apply_chat_template([USER])
    assert prompt.endswith("assistant\n")
    assert whole.choices[0].message.content == expected_text(text_directory, prompt, 20)
    assert whole.usage.prompt_tokens == len(text.encode(prompt, add_special_tokens=False))
    chunks = list(client.chat.completions.create(messages=[USER], stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_without_max_tokens_may_fill_the_context(client: Any) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=[USER], temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.usage.total_tokens == 512


def test_stop_strings_and_logprobs(client: Any, text_directory: Path) -> None:
    full = expected_text(text_directory, PROMPT, 30)
    stop = full[12:15]
    found = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, stop=stop, logprobs=3
    )
    assert found.choices[0].text == full[: full.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    logprobs = found.choices[0].logprobs
    assert all(-50 < value < 0 for value in logprobs.token_logprobs)
    assert len(logprobs.tokens) == found.usage.completion_tokens
    talk = client.chat.completions.create(
        model="tiny", messages=[USER], temperature=0, max_tokens=5, logprobs=True, top_logprobs=2
    )
    entries = talk.choices[0].logprobs.content
    assert len(entries) == 5 and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)


def test_seeds_repeat_and_choices_differ(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "n": 3}
    one = client.completions.create(seed=5, top_p=0.9, **options)
    two = client.completions.create(seed=5, top_p=0.9, **options)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices] and len(set(texts)) == 3
    other = client.completions.create(seed=6, top_p=0.9, **options)
    assert texts != [choice.text for choice in other.choices]


def test_several_prompts_and_token_ids(client: Any, text_directory: Path) -> None:
    prompts = [PROMPT, "One boat carries stone"]
    found = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=9)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    assert texts == [expected_text(text_directory, prompt, 9) for prompt in prompts]
    ids = load_text(text_directory).encode(PROMPT)
    same = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=9)
    assert same.choices[0].text == texts[0]


def test_errors_reach_the_client_as_its_own_classes(client: Any) -> None:
    create = client.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-5", prompt=PROMPT)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as hot:
        create(model="tiny", prompt=PROMPT, temperature=9)
    assert hot.value.param == "temperature" and hot.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="tiny", prompt="word " * 600, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as empty:
        create(model="tiny", prompt="")
    assert empty.value.code == "empty_prompt"


def test_the_key_is_asked_for_where_one_is_set(text_directory: Path) -> None:
    with running_server(FakeRunner(), text_directory, api_key="s3cret") as server:
        with make_client(server, "s3cret") as right:
            assert right.models.list().data
        for wrong in ("", "s3cre", "s3crets", "S3CRET"):
            with make_client(server, wrong or "x") as client:
                with pytest.raises(openai.AuthenticationError):
                    client.completions.create(model="tiny", prompt=PROMPT)
        assert post(server, "/v1/completions", body_of())[0] == 401
        assert get(server, "/v1/nothing")[0] == 401
        assert get(server, "/health")[0] == 200


def test_a_full_queue_is_429_with_retry_after(text_directory: Path) -> None:
    flags = ("--max-streams", "1", "--max-queue", "1")
    with running_server(FakeRunner(step_s=0.02), text_directory, *flags) as server:
        with make_client(server) as client:
            stream = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=400, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(iter(stream))
            waiting = threading.Thread(
                target=lambda: post(server, "/v1/completions", body_of(max_tokens=1))
            )
            waiting.start()
            time.sleep(0.2)
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model="tiny", prompt=PROMPT)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            stream.close()
            waiting.join(10)
            assert not waiting.is_alive()


# HTTP


def test_bodies_that_are_refused(server: Running, text_directory: Path) -> None:
    path = "/v1/completions"
    assert post(server, path, b"{")[0] == 400
    assert post(server, path, b'{"a": "\xff"}')[2]["error"]["code"] == "invalid_json"
    assert post(server, path, body_of(), **{"Content-Type": "text/plain"})[0] == 415
    flags = ("--max-body-kib", "2")
    with running_server(FakeRunner(), text_directory, *flags) as small:
        assert post(small, path, body_of(prompt="x" * 3000))[0] == 413
        with raw_connection(small.port) as chunked:  # no Content-Length to see it coming
            chunked.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n"
                b"800\r\n" + b"x" * 2048 + b"\r\n"
            )
            assert b" 413 " in chunked.recv(100)


def test_a_body_that_never_comes_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "BODY_SECONDS", 0.2)
    with raw_connection(server.port) as slow:
        slow.sendall(http_bytes("/v1/completions", body_of())[:-5])
        assert b" 408 " in slow.recv(100)


def test_unknown_addresses_and_methods_get_json(server: Running) -> None:
    status, body = get(server, "/v2/nothing%0a")
    assert status == 404 and json.loads(body)["error"]["code"] == "unknown_url"
    status, body = get(server, "/v1/completions")
    assert status == 405 and json.loads(body)["error"]["type"] == "invalid_request_error"
    with raw_connection(server.port) as nonsense:
        nonsense.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert b" 400 " in nonsense.recv(100)
    assert get(server, "/health")[0] == 200


def test_metrics_count_what_happened(text_directory: Path) -> None:
    with running_server(FakeRunner(), text_directory) as server:
        post(server, "/v1/completions", body_of(max_tokens=7, ignore_eos=True))
        post(server, "/v1/completions", b"{")
        server.wait_idle()
        page = get(server, "/metrics")[1]
    ok, bad = (
        f'budgeted_lora_requests_total{{endpoint="/v1/completions",status="{status}"}} 1'
        for status in (200, 400)
    )
    assert ok in page and bad in page
    assert "budgeted_lora_generated_tokens_total 7" in page
    assert "budgeted_lora_time_to_first_token_seconds_count 1" in page
    assert "budgeted_lora_time_between_tokens_seconds_count 6" in page
    assert "budgeted_lora_choices_waiting 0" in page


# Load and faults


def test_many_streams_at_once(text_directory: Path) -> None:
    """64 streams of different lengths: each gets what it would get alone."""
    prompts = [f"{PROMPT} {'and the sea ' * (i % 7)}{i}" for i in range(STREAMS)]

    async def one(client: Any, index: int) -> str:
        await asyncio.sleep(random.Random(index).random() * 0.2)
        stream = await client.completions.create(
            model="tiny", prompt=prompts[index], temperature=0, max_tokens=8 + index % 24,
            stream=True,
        )  # fmt: skip
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody(server: Running) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(STREAMS)))

    runner = FakeRunner()
    with running_server(runner, text_directory) as server:
        texts = asyncio.run(asyncio.wait_for(everybody(server), 60))
        assert server.wait_idle()
        assert server.metrics.running.value() == 0
    assert max(batch for batch, _ in runner.shapes) > STREAMS // 16  # fewer on a busy machine
    for index, text in enumerate(texts):
        assert text == expected_text(text_directory, prompts[index], 8 + index % 24)


def mutated(valid: bytes, rng: random.Random) -> bytes:
    """One of: bytes changed, cut or repeated; a value replaced; a key renamed, added, removed."""
    if rng.random() < 0.5:
        body = bytearray(valid)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            action = rng.randrange(4)
            if action == 0:
                body[at] = rng.randrange(256)
            elif action == 1:
                del body[at : at + rng.randint(1, 20)]
            elif action == 2:
                body[at:at] = body[at : at + rng.randint(1, 20)]
            else:
                body[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
            if not body:
                break
        return bytes(body)
    fields = json.loads(valid)
    strange: list[Any] = [
        None, True, -1, 0, 1, 10**30, 1e308, -1e-308, float("nan"), float("inf"), "", "x" * 5000,
        "\ud800", "\x00", [], [[]], [None], {}, {"a": {"b": []}}, [1, "a"], [10**9], "tiny",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(fields)) if fields else "model"
        action = rng.randrange(4)
        if action == 0:
            fields.pop(key, None)
        elif action == 1:
            fields[rng.choice(("temperature", "n", "seed", "stop", "echo", "logit_bias"))] = (
                rng.choice(strange)
            )
        elif action == 2:
            fields[key + rng.choice(("", "s", "\u200b"))] = fields.get(key)
        else:
            fields[key] = rng.choice(strange)
    return json.dumps(fields).encode()


def valid_bodies() -> list[tuple[str, bytes]]:
    common = {"model": "tiny", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1}
    plain = {**common, "prompt": PROMPT, "stop": ["zz"], "logprobs": 2}
    many = {**common, "prompt": [[5, 6], [7]], "n": 2, "logit_bias": {"9": -5}}
    talk = {**common, "messages": [USER, {"role": "assistant", "content": "two"}, USER]}
    talk |= {"stream": True, "stream_options": {"include_usage": True}}
    completions, chats = "/v1/completions", "/v1/chat/completions"
    return [
        (completions, json.dumps(plain).encode()),
        (completions, json.dumps(many).encode()),
        (chats, json.dumps(talk).encode()),
    ]


def check_answer(response: http.client.HTTPResponse, body: bytes) -> int:
    """Every answer is a good one or an OpenAI-style error with a client's status."""
    if response.status == 200:
        kind = response.headers["content-type"]
        if kind.startswith("text/event-stream"):
            assert body.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(body)["choices"]
        return 200
    error = json.loads(body)["error"]
    assert 400 <= response.status < 500, (response.status, body)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status


def test_a_thousand_mutated_requests(text_directory: Path) -> None:
    """Each gets a proper answer, and a stream beside them all gives what it gives alone."""
    rng = random.Random(20261123)
    flags = ("--max-tokens", "400")
    with running_server(FakeRunner(), text_directory, *flags) as server:
        beside: list[str] = []
        is_over = threading.Event()

        def stream_all_the_time() -> None:
            with make_client(server) as client:
                while not is_over.is_set():
                    chunks = client.completions.create(
                        model="tiny", prompt=PROMPT, temperature=0, max_tokens=60, stream=True
                    )
                    beside.append("".join(chunk.choices[0].text for chunk in chunks))

        thread = threading.Thread(target=stream_all_the_time)
        thread.start()
        statuses = []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            for path, valid in valid_bodies():
                connection.request("POST", path, valid, {"Content-Type": "application/json"})
                response = connection.getresponse()
                assert check_answer(response, response.read()) == 200
            for _ in range(MUTATIONS):
                path, valid = rng.choice(valid_bodies())
                body = mutated(valid, rng)
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                statuses.append(check_answer(response, response.read()))
        finally:
            is_over.set()
            thread.join(30)
            connection.close()
        assert not thread.is_alive()
        assert server.metrics.engine_failures.value() == 0
        assert server.metrics.finished.value("error") == 0
        assert server.wait_idle()
    assert statuses.count(400) > MUTATIONS // 2 and statuses.count(200) > MUTATIONS // 50
    assert len(beside) > 3
    assert set(beside) == {expected_text(text_directory, PROMPT, 60)}


def test_clients_that_hang_up_leave_the_batch(text_directory: Path) -> None:
    runner = FakeRunner(step_s=0.005)
    with running_server(runner, text_directory, "--max-streams", "6") as server:
        endless = {"max_tokens": 450, "ignore_eos": True, "temperature": 0}
        stays = make_client(server)
        stream = stays.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=80, temperature=0, stream=True
        )
        pieces = [next(stream).choices[0].text]
        leaving = []
        for index in range(10):  # more than run at once: some of them leave while they wait
            connection = raw_connection(server.port)
            body = body_of(stream=index % 2 == 0, **endless)
            connection.sendall(http_bytes("/v1/completions", body))
            leaving.append(connection)
        half = raw_connection(server.port)
        half.sendall(http_bytes("/v1/completions", body_of())[:-9])
        assert b" 200 " in leaving[0].recv(4096)
        half.close()
        for index, connection in enumerate(leaving):
            if index % 3 == 0:  # a reset instead of a clean end
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == expected_text(text_directory, PROMPT, 80)
        assert server.wait_idle(3)  # 450 steps of 5 ms would take longer
        assert server.metrics.finished.value("cancelled") == 10
        stays.close()


def test_a_client_that_does_not_read_is_dropped(text_directory: Path) -> None:
    """Its answer is larger than all buffers on the way; others are not held up."""
    runner = FakeRunner(max_context=4000, step_s=0.001)
    with running_server(runner, text_directory, stall_seconds=0.5) as server:
        lazy = raw_connection(server.port, receive_bytes=4096)
        body = {
            "model": "tiny", "messages": [USER], "max_tokens": 3000, "stream": True,
            "logprobs": True, "top_logprobs": 20, "ignore_eos": True,
        }  # fmt: skip
        lazy.sendall(http_bytes("/v1/chat/completions", json.dumps(body).encode()))
        began = time.monotonic()
        with make_client(server) as client:
            found = client.completions.create(
                model="tiny", prompt=PROMPT, temperature=0, max_tokens=30
            )
        assert found.choices[0].text == expected_text(text_directory, PROMPT, 30)
        assert time.monotonic() - began < 5
        until = time.monotonic() + 20
        while server.metrics.finished.value("cancelled") == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert server.metrics.finished.value("cancelled") == 1
        lazy.close()


def test_an_engine_failure_is_an_error_of_the_server(text_directory: Path) -> None:
    bad_token = 77
    with running_server(FakeRunner(fails_on=bad_token), text_directory) as server:
        with make_client(server) as client:
            with pytest.raises(openai.InternalServerError) as failed:
                client.completions.create(model="tiny", prompt=[5, bad_token], stream=True)
            assert failed.value.code == "engine_failed"
            client.completions.create(model="tiny", prompt=[5, 6], max_tokens=3)


# Shutdown and start


def test_shutdown_finishes_running_answers_and_refuses_new_ones(text_directory: Path) -> None:
    with running_server(FakeRunner(step_s=0.01), text_directory) as server:
        with make_client(server) as client:
            stream = client.completions.create(
                model="tiny", prompt=PROMPT, temperature=0, max_tokens=100, stream=True
            )
            pieces = [next(stream).choices[0].text]
            server.server.handle_exit(signal.SIGTERM, None)
            time.sleep(0.3)
            status, headers, body = post(server, "/v1/completions", body_of())
            assert status == 503 and body["error"]["code"] == "shutting_down"
            assert headers["Retry-After"]
            health, page = get(server, "/health")
            assert health == 503 and json.loads(page)["status"] == "draining"
            pieces += [chunk.choices[0].text for chunk in stream]
            assert "".join(pieces) == expected_text(text_directory, PROMPT, 100)
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_shutdown_has_a_limit(text_directory: Path) -> None:
    flags = ("--drain-seconds", "0.3")
    with running_server(FakeRunner(step_s=0.02), text_directory, *flags) as server:
        with make_client(server) as client:
            stream = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=450, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(stream)
            server.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.APIError) as ended:
                list(stream)
            assert ended.value.code == "shutting_down"
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_wrong_flags_are_one_line_and_status_2(
    text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(text_directory, engine)
    (engine / "model.onnx").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--run", str(engine), "--port", port]) == 2
        assert "another program listens" in one_error(capsys)
    for flags, word in (
        (["--port", "70000"], "--port 70000"),
        (["--host", "no.such.host.invalid"], "no such address"),
        (["--max-streams", "0"], "--max-streams 0"),
        (["--max-seconds", "nan"], "--max-seconds nan"),
    ):
        assert main(["serve", "--run", str(engine), *flags]) == 2
        assert word in one_error(capsys)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    written = capsys.readouterr().err
    assert written.startswith("error: ") and written.count("\n") == 1
    return written
