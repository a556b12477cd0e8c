"""How a sandbox hands a listening socket to the gateway. Pure.

On a connection to its slot's gateway socket it asks for an upgrade (RFC 9110 section 7.8); with the answer
comes a descriptor (unix(7), SCM_RIGHTS): one end of a pair of stream sockets. There it gives the listener's
descriptor with one byte, and gets one byte back. The listener is the gateway's for as long as both stand.
"""

TARGET = b"/.cortex/listener"
REQUEST = b"GET %s HTTP/1.1\r\nhost: cortex\r\nconnection: upgrade\r\nupgrade: cortex-listener\r\n\r\n" % TARGET
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: cortex-listener\r\n\r\n"
GIVEN = b"L"
TAKEN = b"+"
