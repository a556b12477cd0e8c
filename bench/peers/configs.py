"""Configurations of the proxies that are not ours: one thread or worker each, the same far end."""

from __future__ import annotations

import os


def haproxy(port: int, upstream: str) -> str:
    """HAProxy, one thread, HTTP mode: the upgrade is parsed, then the tunnel carries bytes."""
    return f"""
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 10m
frontend front
    bind 127.0.0.1:{port}
    default_backend agent
backend agent
    server agent unix@{upstream}
"""


def nginx(port: int, upstream: str, directory: str) -> str:
    """nginx, one worker. Run by root it would give up the rights to the far end's socket."""
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://unix:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
