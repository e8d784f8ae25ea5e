"""What the commands that `scripts/demo` calls say in its tests, and a script that says it."""

from typing import Any

SPEEDUP = {"ratio": 2.0, "low": 1.9, "high": 2.1}
LOAD: dict[str, Any] = {
    "ttft_s": {"dense": {"median": 0.2}, "sparse": {"median": 0.1}},
    "tpot_s": {"dense": {"median": 0.03}, "sparse": {"median": 0.015}},
    "output_tokens_per_s": {"dense": 25.0, "sparse": 50.0},
    "speedups": {"ttft_p50": SPEEDUP, "tpot_p50": SPEEDUP, "throughput": SPEEDUP},
    "harness": {"is_void": False, "why": None},
    "memory_bytes": {"dense": 2e6, "sparse": 1e6},
}


# What each command says, and how it makes noise; `cast-serve up` serves until SIGINT.
COMMAND = """
import json, pathlib, signal, sys

words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
said = json.loads((pathlib.Path(sys.argv[0]).parent / "said.json").read_text())
print("noise", *words, file=sys.stderr)
print("10%\\r100%", file=sys.stderr)
for number in range(30):
    print(f"noise {number}", file=sys.stderr)
if said["failing"] in " ".join(words):
    sys.exit("no room: " + "x" * 200)
if words[1] == "up":
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer(said["metrics"] if self.path == "/metrics" else "{}")

        def do_POST(self):
            message = {"role": "assistant", "content": said["answer"]}
            choice = {"text": said["answer"], "message": message}
            self.answer(json.dumps({"choices": [choice]}))

        def answer(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    port = int(words[words.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
if "--out" in words:
    out = pathlib.Path(words[words.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "report.html").touch()
print(json.dumps({"text": "noise", **said[words[1] if words[0] != "cast-loadtest" else "load"]}))
"""
CONVERTED = {
    "bits_per_weight": 9.0,
    "linear_bytes_ratio": 0.5625,
    "zeros": 0.5,
    "dense_linear_weight_bytes": 2e8,
    "linear_weight_bytes": 1e8,
    "total_weight_bytes": 3e8,
}
SAID: dict[str, Any] = {
    "failing": "nothing",
    "answer": " Paris.\n\nThe capital of Spain is [Madrid], and that of Italy is Rome, of old.",
    "metrics": "".join(
        f'cast_variant_info{{variant="{name}",weight_bytes="{weight_bytes}"}} 1\n'
        for name, weight_bytes in LOAD["memory_bytes"].items()
    ),
    "eval": {
        "perplexity": 21.8,
        "perplexity_soft": 50.0,
        "perplexity_hard": 50.1,
        "num_tokens": 16352,
    },
    "oneshot": {},
    "run": {"tokens_seen": 40960, "flipped_share": 0.0, "perplexity_hard": 50.1},
    "convert": CONVERTED,
    "inspect": CONVERTED,
    "load": LOAD,
}
