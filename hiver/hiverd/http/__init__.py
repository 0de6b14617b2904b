"""HTTP/1.1 as both proxies of the server speak it, ingress and egress: heads, framing, connections. No policy."""
