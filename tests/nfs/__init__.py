"""A network filesystem that can be watched and spoilt: one directory is the server, each mount is a client of its own.

Every client is a process (FUSE) with the caches of Linux's NFS client, so two mounts disagree as two machines do.
"""
