# Stands in for rayproject/ray where no registry can be reached: Debian by debootstrap, Ray, the user 1000.
FROM scratch
ADD rootfs.tar /
COPY pip.conf /etc/pip.conf
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN useradd --uid 1000 --gid 100 --create-home --shell /bin/bash ray
ENV PATH=/home/ray/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/home/ray
USER 1000
WORKDIR /home/ray
ARG RAY_VERSION
RUN python3 -m venv venv && pip install --no-cache-dir ray[default]==${RAY_VERSION}
