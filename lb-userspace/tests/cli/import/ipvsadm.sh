#!/bin/sh
VIP=192.0.2.10
ipvsadm -C
ipvsadm -A -t $VIP:443 -s sed -p 300
for real in 10.1.0.11 10.1.0.12; do
    ipvsadm -a -t $VIP:443 -r $real:8443 -g
done
