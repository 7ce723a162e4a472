"""grpcio's server on as many threads as Python's pool has by default. No code is generated: bytes stay bytes."""

from concurrent.futures import ThreadPoolExecutor

import grpc


def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


server = grpc.server(ThreadPoolExecutor())
server.add_generic_rpc_handlers(
    [grpc.method_handlers_generic_handler("Echo", {"echo": grpc.unary_unary_rpc_method_handler(echo)})]
)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
