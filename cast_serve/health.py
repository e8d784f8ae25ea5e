"""A URL -> exit 0 if it answers 2xx within 4 s, else 1: the images' and compose's health check.

``python -m cast_serve.health http://127.0.0.1:8001/health``. Words without quotes and blanks, which
every container engine splits alike, and no curl in the image.
"""

import sys
import urllib.request
from http.client import HTTPException

TIMEOUT_S = 4.0


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].startswith("http://"):
        print("usage: python -m cast_serve.health http://HOST:PORT/PATH", file=sys.stderr)
        return 2
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(sys.argv[1], timeout=TIMEOUT_S).close()
    except (OSError, HTTPException, ValueError) as error:  # an answer that is not 2xx: OSError
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
