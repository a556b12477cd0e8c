"""Configurations of the HTTP gateways that are not ours: one worker each, no log, no buffering, one provider."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

KEY = "sk-real-0123456789abcdef"
"""What the provider is paid with; each gateway puts it in."""


def nginx(port: int, provider: int, directory: str) -> str:
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 0;
    keepalive_requests 10000000;
    upstream provider {{
        server 127.0.0.1:{provider};
        keepalive 256;
        keepalive_requests 10000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://provider;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "Bearer {KEY}";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
    }}
}}
"""


def nginx_tls(ports: Mapping[str, int], directory: str) -> str:
    """A stand-in provider over TLS (cert.pem, key.pem): at each port one protocol, "h2" or "http/1.1". Bodies are read
    to their end, which ``return`` alone would not do, before 700 B are answered."""
    user = "user root;" if os.geteuid() == 0 else ""
    answer = json.dumps({"id": "chatcmpl-bench", "content": "word " * 130})
    listen = "".join(f"listen 127.0.0.1:{port} ssl{' http2' * (name == 'h2')};" for name, port in ports.items())
    return f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_body_buffer_size 128k;
    client_max_body_size 0;
    keepalive_requests 10000000;
    keepalive_timeout 600s;
    upstream answer {{
        server unix:{directory}/answer;
        keepalive 256;
        keepalive_requests 10000000;
    }}
    server {{
        listen unix:{directory}/answer;
        default_type application/json;
        location / {{ return 200 '{answer}'; }}
    }}
    server {{
        {listen}
        ssl_certificate {directory}/cert.pem;
        ssl_certificate_key {directory}/key.pem;
        ssl_session_cache shared:tls:1m;
        location / {{
            proxy_pass http://answer;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


def haproxy(port: int, provider: int) -> str:
    """Without http-no-delay it gathers the chunks of a stream for 200 ms."""
    return f"""
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
    option http-no-delay
frontend front
    bind 127.0.0.1:{port}
    http-request set-header Authorization "Bearer {KEY}"
    default_backend provider
backend provider
    server provider 127.0.0.1:{provider}
"""


def litellm(provider: int, master_key: str) -> str:
    """JSON, which is YAML too."""
    model = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{provider}/v1", "api_key": KEY}
    return json.dumps(
        {
            "model_list": [{"model_name": "bench", "litellm_params": model}],
            "general_settings": {"master_key": master_key},
            "litellm_settings": {"telemetry": False, "num_retries": 0},
        }
    )
