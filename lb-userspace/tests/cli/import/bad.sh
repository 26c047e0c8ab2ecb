ipvsadm -A -t 192.0.2.10:80
ipvsadm -a -t 192.0.2.10:80 --real-sever 10.1.0.11
