"""zerorpc with its own defaults: a greenlet for each call, heartbeats, and a thread of libzmq for the sockets."""

import zerorpc


class Methods:
    def echo(self, value: object) -> object:
        return value


server = zerorpc.Server(Methods())
server.bind("tcp://127.0.0.1:*")
print(server._events._socket.last_endpoint.decode().rpartition(":")[2].rstrip("\0"), flush=True)
server.run()
