"""How a sandbox hands a listening socket to the gateway, on a connection to its slot's gateway socket. Pure.

An upgrade (RFC 9110 section 7.8), then one byte with the descriptor (unix(7), SCM_RIGHTS), then one byte
back. The listener is the gateway's for as long as the connection stands.
"""

TARGET = b"/.cortex/listener"
REQUEST = b"GET %s HTTP/1.1\r\nhost: cortex\r\nconnection: upgrade\r\nupgrade: cortex-listener\r\n\r\n" % TARGET
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: cortex-listener\r\n\r\n"
GIVEN = b"L"
TAKEN = b"+"
