"""Several nodes on one machine: network namespaces with a host name and an address each, and toy workers for them."""
