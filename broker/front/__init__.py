"""Front door: WebSocket handshake and frame relay."""
