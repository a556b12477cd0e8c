"""Control API: HTTP for web apps and operators."""
