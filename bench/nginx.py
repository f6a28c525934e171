"""nginx in front of MLflow, with an application that allows or refuses each request."""

from __future__ import annotations

import getpass
from pathlib import Path

from tests.harness import Server

_CACHE = """
      proxy_cache keys;
      proxy_cache_key $http_x_api_key;
      proxy_cache_valid 200 60s;
      proxy_cache_valid 401 5s;
      proxy_cache_lock on;"""


def configuration(
    folder: Path, port: int, *, workers: int, mlflow: Server, check: Server, cached: bool
) -> str:
    """Return an nginx.conf that streams bodies of any size; with `cached`, nginx caches verdicts."""
    temporary = "\n".join(
        f'  {kind}_temp_path "{folder}/{kind}";'
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off;
user {getpass.getuser()};
pid "{folder}/pid";
worker_processes {workers};
events {{ worker_connections 512; }}
http {{
  access_log "{folder}/access.log";
{temporary}
  proxy_cache_path "{folder}/cache" keys_zone=keys:1m;
  upstream mlflow {{ server 127.0.0.1:{mlflow.port}; keepalive 16; }}
  upstream check {{ server 127.0.0.1:{check.port}; keepalive 16; }}
  client_max_body_size 0;
  proxy_http_version 1.1;
  server {{
    listen 127.0.0.1:{port};
    location = /health {{ proxy_pass http://mlflow; }}
    location = /check {{
      internal;
      proxy_pass http://check/;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_set_header Connection "";{_CACHE if cached else ""}
    }}
    location / {{
      auth_request /check;
      proxy_pass http://mlflow;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
      proxy_read_timeout 600s;
      proxy_send_timeout 600s;
    }}
  }}
}}
"""
