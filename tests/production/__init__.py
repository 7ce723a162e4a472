"""gmprpc with what stands beside it in production: gunicorn, HAProxy, Celery, Prometheus."""
