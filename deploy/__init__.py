"""Ways to run manylora on more than one process or machine. The server itself never imports this."""
