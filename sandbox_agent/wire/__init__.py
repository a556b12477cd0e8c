"""What broker and agent server say to each other. Pure; the one thing that both import."""
