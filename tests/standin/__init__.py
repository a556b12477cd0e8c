"""Stand-ins for the providers' APIs: what real agent CLIs talk to in tests. See ``script`` for what they answer."""
